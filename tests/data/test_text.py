"""Files as text: by their byte order mark, with one kind of line end; and what no person wrote."""

import base64
import codecs
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.data.text import (
    decode,
    is_blank,
    is_text,
    machine_lines,
    nfc,
    not_utf8,
    to_utf8,
    without_machine_lines,
)
from niels_gpt.files import mapped

written = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"))
MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


def lines(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")


@given(written)
def test_utf8_is_itself_with_one_kind_of_line_end(text):
    assert decode(text.encode()) == (lines(text), "")
    assert not_utf8(text.encode()) == ""


@pytest.mark.parametrize("encoding", MARKS)
@given(text=written)
def test_the_byte_order_mark_says_the_encoding_and_is_dropped(encoding, text):
    data = MARKS[encoding] + text.encode(encoding)
    found = decode(data)
    assert found.text == lines(text)
    if encoding == "utf-8":
        assert found.problem == not_utf8(data) == ""
    else:
        assert found.problem == f"{encoding.upper()}, converted to UTF-8"
        assert not_utf8(data) == f"{encoding.upper()}, used as it is: save it as UTF-8"


@given(st.binary(max_size=40))
def test_what_is_not_utf8_is_replaced_and_said(data):
    text, problem = decode(data)
    try:
        data.decode()
    except UnicodeDecodeError:
        assert problem
        assert not_utf8(data)
    assert "\r" not in text
    text.encode()


def test_replaced_characters_are_counted_without_those_in_the_text():
    assert decode("déjà \ufffd".encode("latin-1", "replace")).problem.startswith("not UTF-8: 2 ")
    data = "a \ufffd".encode() + b"\xff\xfe"
    assert decode(data).problem == "not UTF-8: 2 characters were replaced"
    assert not_utf8(data) == "not UTF-8: 2 invalid characters, used as they are"
    assert not_utf8(b"x" * (2**20 - 1) + "é".encode() + b"y" * 9) == ""  # between two parts


def test_utf16_without_its_mark_is_noticed():
    assert "4 NUL characters" in decode("text".encode("utf-16-le")).problem


PICTURE = base64.b64encode(bytes(range(256)) * 400).decode()
DRAWING = json.dumps({"type": "line", "points": [[i, i * i] for i in range(900)]}, separators=",:")


@pytest.mark.parametrize(
    "line", [f"![a picture](data:image/png;base64,{PICTURE})", DRAWING, "f" * 2001]
)
def test_machine_lines_are_found_and_can_be_left_out(line):
    text = f"before\n{line}\nafter\n"
    assert machine_lines(text.encode()) == [line.encode()]
    assert without_machine_lines(text.encode()) == b"before\nafter\n"


@pytest.mark.parametrize(
    "line",
    ["word " * 9000, "f" * 2000, "日本語の長い段落。" * 999, "Ünïcödé" * 999, "https://a.b/" * 9],
)
def test_what_people_write_is_no_machine_line(line):
    text = f"before\n{line}\nafter\n"
    assert machine_lines(text.encode()) == []
    assert without_machine_lines(text.encode()) == text.encode()


def test_names_are_compared_in_one_form():
    assert nfc("u\u0308.md") == nfc("ü.md") == "ü.md"
    assert nfc("\udcff.md") == "\udcff.md"


PIECES = ["a", "\ufffd", "é", "😀", "\r\n", "\r", "\n", "\0", "\u3000"]


@given(
    mark=st.sampled_from(["", *MARKS]),
    parts=st.lists(st.sampled_from(PIECES) | st.sampled_from([b"\xff", b"\xe2\x82", b"\xd8"])),
    size=st.integers(1, 5),
)
def test_a_file_is_the_same_text_in_parts_of_any_size(mark, parts, size):
    encoding = mark or "utf-8"
    encoded = (p.encode(encoding) if isinstance(p, str) else p for p in parts)
    data = MARKS.get(mark, b"") + b"".join(encoded)

    def looked_at():
        return decode(data), not_utf8(data), is_text(data), is_blank(to_utf8(data).text)

    whole = looked_at()
    body = data.decode(encoding, "replace").removeprefix("\ufeff")
    if not data.startswith(codecs.BOM_UTF32_LE):
        assert whole[0].text == lines(body)
        assert whole[3] == (not body.strip())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped, "CHUNK", size)
        assert looked_at() == whole


def test_a_note_with_an_emoji_needs_little_more_memory_than_its_bytes():
    data = b"plain text of a note\n" * 500_000 + "😀".encode()
    tracemalloc.start()
    try:
        text, _ = to_utf8(data)
        assert machine_lines(text) == []
        assert not is_blank(text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert text == data
    assert peak < 0.3 * len(data)
