"""The chat primer: reading it, and splitting it by dialogue."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.data import DIALOGUE_DELIM, load_primer_text, split_primer_dialogues

blocks = st.lists(st.text("ab\n éß", max_size=8), max_size=20)


@given(blocks, st.floats(0, 0.99), st.integers(0, 2**63 - 1))
def test_the_split_is_a_partition_of_the_stripped_blocks(blocks, val_frac, seed):
    kept = [block.strip() for block in blocks if block.strip()]
    halves = split_primer_dialogues(DIALOGUE_DELIM.join(blocks), val_frac=val_frac, seed=seed)
    train, val = ([block for block in half.split(DIALOGUE_DELIM) if block] for half in halves)
    assert sorted(train + val) == sorted(kept)
    assert len(val) == (max(1, int(len(kept) * val_frac)) if len(kept) >= 2 else 0)
    if len(kept) < 2:
        assert halves[1] == ""


@given(st.integers(0, 2**63 - 1))
def test_adding_a_dialogue_moves_at_most_one_other(seed):
    texts = [f"user: {i}\nassistant: {i}" for i in range(25)]
    halves = [
        split_primer_dialogues(DIALOGUE_DELIM.join(given), seed=seed, val_frac=0.2)
        for given in (texts, ["user: new", *texts])
    ]
    before, after = (set(val.split(DIALOGUE_DELIM)) for _, val in halves)
    assert len((before ^ after) - {"user: new"}) <= 1


def test_the_delimiter_is_an_argument():
    assert split_primer_dialogues("a--b--c", val_frac=0.4, seed=0, delimiter="--") in [
        ("b--c", "a"),
        ("a--c", "b"),
        ("a--b", "c"),
    ]


@pytest.mark.parametrize("val_frac", [-0.01, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize("text", ["", "one", f"one{DIALOGUE_DELIM}two"])
def test_a_fraction_outside_its_range_is_refused(text, val_frac):
    with pytest.raises(ValueError, match="val_frac"):
        split_primer_dialogues(text, val_frac=val_frac, seed=0)


@pytest.mark.parametrize(
    "content", [b"a\r\n\r\n<dialogue>\r\n\r\nb", b"\xef\xbb\xbfa\n\n<dialogue>\n\nb"]
)
def test_primers_written_on_windows_part_like_any_other(tmp_path, content):
    path = tmp_path / "primer.txt"
    path.write_bytes(content)
    assert load_primer_text(path) == f"a{DIALOGUE_DELIM}b"
    assert load_primer_text(str(path)) == f"a{DIALOGUE_DELIM}b"


def test_bad_bytes_are_replaced(tmp_path):
    path = tmp_path / "primer.txt"
    path.write_bytes(b"caf\xe9")
    assert load_primer_text(path) == "caf\ufffd"
