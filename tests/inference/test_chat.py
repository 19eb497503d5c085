"""Chat: what is shown of a reply, what fits into the context, and the commands."""

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt import paths
from niels_gpt.chat_format import PROMPT, extract_assistant_reply, format_chat
from niels_gpt.config import ModelConfig
from niels_gpt.data import DIALOGUE_DELIM, load_primer_text, split_primer_dialogues
from niels_gpt.inference import chat as chat_module
from niels_gpt.inference.chat import (
    OPENING,
    STOPS,
    Voice,
    answer,
    context_notes,
    converse,
    first_note,
    first_stop,
    fit,
    new_chat,
    obey,
    prompt_of,
    prompt_room,
    visible,
)
from niels_gpt.inference.generate import Sampling
from tests.trained import lively_state


def voice(T=64, max_bytes=30, temperature=1.0):
    cfg = ModelConfig(T=T, C=12, L=2, H=2, d_ff=16)
    return Voice(lively_state(cfg).params, cfg, Sampling(temperature), max_bytes)


def turn(role, content):
    return {"role": role, "content": content}


def talk(*lines, by=None, system=None, seed=1):
    """Hold a conversation; return the chat at its end, what was shown, and what was told."""
    shown, notes = [], []
    chat = new_chat(system, seed)
    chat = converse(by or voice(), chat, lines, shown.append, notes.append)
    return chat, "".join(shown), notes


# --- what is shown -----------------------------------------------------------------------------

PIECES = "|\n|user: |\nuser|\nuser: |\nassistant: |\nsystem: |sys|assist|<|dialogue>|\n\n<dialogue>"
fragments = st.sampled_from([*PIECES.split("|"), " ", ":", "Hello", "é", "😀", "x\n", "\n\n", "\t"])
texts = st.lists(fragments, max_size=12).map("".join)


def before_the_first_stop(text):
    return text[: min((text.find(stop) for stop in STOPS if stop in text), default=len(text))]


@given(text=texts, size=st.integers(1, 5))
def test_what_is_shown_is_the_reply(text, size):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    reply = extract_assistant_reply(PROMPT + before_the_first_stop(text))
    assert "".join(visible(pieces)) == reply


@given(text=texts)
def test_no_stop_is_ever_shown(text):
    shown = "".join(visible(text))
    assert not any(stop in shown for stop in STOPS)


@given(text=texts, after=texts)
def test_what_follows_the_first_stop_is_not_even_generated(text, after):
    pulled = []

    def pieces():
        for piece in [*text, *STOPS[0], *after]:
            pulled.append(piece)
            yield piece

    list(visible(pieces()))
    whole = "".join(pulled)
    assert any(whole.endswith(stop) for stop in STOPS)
    assert sum(stop in whole for stop in STOPS) == 1


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cc", "Z", "Cs"]), min_size=1))
def test_text_that_begins_no_stop_is_shown_at_once(text):
    assert list(visible(text)) == list(text)


@pytest.mark.parametrize("tag", STOPS)
def test_a_tag_is_held_back_until_it_is_none(tag):
    assert list(visible(["Hi", *tag[:-1]])) == ["Hi", tag[:-1].rstrip()]
    assert list(visible(["Hi", *tag[:-1], "!"])) == ["Hi", tag[:-1] + "!"]
    assert list(visible(["Hi", *tag, "never"])) == ["Hi"]


@pytest.mark.parametrize("unit", ["a word ", "x", " ", "\n", "\nuser:"])
def test_what_is_searched_with_each_piece_does_not_grow(monkeypatch, unit):
    lengths = []
    monkeypatch.setattr(chat_module, "first_stop", lambda text: lengths.append(len(text)))
    assert "".join(visible(unit * 100)) == (unit * 100).strip()
    assert max(lengths) <= max(map(len, STOPS))


# --- what fits ---------------------------------------------------------------------------------

words = st.text(alphabet="abé ", max_size=12)
exchanges = st.tuples(words, words).map(
    lambda pair: [turn("user", pair[0]), turn("assistant", pair[1])]
)
conversations = st.builds(
    lambda system, pairs, last: [*system, *chain(*pairs), turn("user", last)],
    st.lists(words.map(lambda text: turn("system", text)), max_size=1),
    st.lists(exchanges, max_size=5),
    words,
)


def size(messages):
    return len(format_chat(messages).encode())


@given(messages=conversations, room=st.integers(1, 200))
def test_the_latest_exchanges_that_fit_are_kept_and_the_system_message_before_them(messages, room):
    kept = fit(messages, room)
    system = [m for m in messages if m["role"] == "system"]
    turns = [m for m in kept if m["role"] != "system"]
    assert turns == messages[-len(turns) :]
    assert turns[0]["role"] == "user"
    assert kept[: -len(turns)] in (system, [])
    left_out = [m for m in messages[: -len(turns)] if m["role"] != "system"]
    if size(kept) > room:
        assert kept == messages[-1:]
    elif kept[:1] == system[:1] and left_out:
        assert size([*system, *left_out[-2:], *turns]) > room
    elif system and kept[:1] != system:
        assert size([*system, *turns]) > room
        assert kept == messages[-1:]


@pytest.mark.parametrize("room", [1, 100, 10**6])
def test_each_message_is_measured_a_few_times_however_many_there_are(monkeypatch, room):
    messages = [turn("user", "a"), turn("assistant", "b")] * 200 + [turn("user", "c")]
    counts = []

    def counted(turns):
        counts.append(len(turns))
        return format_chat(turns)

    monkeypatch.setattr(chat_module, "format_chat", counted)
    fit(messages, room)
    assert sum(counts) <= 4 * len(messages)


def test_a_conversation_that_fits_is_kept_whole_and_nothing_is_said():
    messages = [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    assert fit(messages, size(messages)) == messages
    assert context_notes(messages, 80) == []


def test_the_room_leaves_a_quarter_for_the_reply():
    assert prompt_room(256) == 192


def test_it_is_said_what_was_left_out():
    messages = [turn("user", "a" * 30), turn("assistant", "b" * 30), turn("user", "c")]
    assert context_notes(messages, 64) == [
        "the context of 64 bytes is full: the oldest 2 of 3 messages are left out"
    ]
    assert context_notes([turn("user", "c" * 100)], 64) == [
        "the context of 64 bytes is full: only the last 54 of 118 bytes of the last turn are seen"
    ]


# --- what the model reads is what it learned from -----------------------------------------------

PRIMER_TRAIN, PRIMER_VAL = split_primer_dialogues(
    load_primer_text(paths.primer_path()), seed=42, val_frac=0.1
)


def shipped_dialogues(text):
    """Yield each dialogue of the primer as messages, for its turns are lines."""
    for block in text.split(DIALOGUE_DELIM):
        yield [turn(*line.split(": ", 1)) for line in block.split("\n")]


@pytest.mark.parametrize("text", [PRIMER_TRAIN, PRIMER_VAL], ids=["train", "val"])
def test_prompt_reply_and_end_of_every_turn_are_in_the_stream_as_chat_has_them(text):
    stream = OPENING + text + DIALOGUE_DELIM
    for messages in shipped_dialogues(text):
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = prompt_of(messages[:i], 10_000).decode()
                _, found, after = stream.partition(prompt + message["content"])
                assert found, prompt
                assert first_stop(after) == 0, after[:20]


@given(messages=conversations, T=st.integers(8, 300))
def test_a_prompt_is_the_turns_that_fit_and_opens_as_a_dialogue_if_there_is_room(messages, T):
    room = prompt_room(T)
    turns = format_chat(fit(messages, room))
    prompt = prompt_of(messages, T).decode()
    assert prompt == (OPENING + turns if len((OPENING + turns).encode()) <= room else turns)


# --- the conversation --------------------------------------------------------------------------


def test_each_line_gets_a_reply_and_both_are_kept():
    chat, shown, _ = talk("Hello", "", "  How are you? \n", system="Be kind.")
    roles = [m["role"] for m in chat.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in chat.messages[1::2]] == ["Hello", "How are you?"]
    replies = [m["content"] for m in chat.messages[2::2]]
    assert shown == "".join(f"{reply}\n" for reply in replies)
    assert all(replies)


def test_the_same_lines_and_seed_get_the_same_replies_and_another_seed_others():
    assert talk("Hi", "So?") == talk("Hi", "So?")
    assert talk("Hi", seed=1)[1] != talk("Hi", seed=2)[1]
    assert talk("/seed 2", "Hi", seed=1)[1] == talk("Hi", seed=2)[1]


def test_a_reset_forgets_all_but_the_system_message():
    chat, shown, _ = talk("Hi", "/reset", "Hi", system="Be kind.")
    half = len(shown) // 2
    assert shown[:half] == shown[half:]
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]


def test_turns_of_one_conversation_have_draws_of_their_own():
    deaf = voice(T=20)  # the last message fills the context: all prompts are the same
    chat, _, _ = talk("x" * 30, "x" * 30, by=deaf)
    replies = [m["content"] for m in chat.messages if m["role"] == "assistant"]
    assert replies[0] != replies[1]


def test_a_full_context_drops_the_oldest_turns_and_says_so():
    chat, _, notes = talk("first " * 4, "second", by=voice(T=64))
    assert notes == ["the context of 64 bytes is full: the oldest 2 of 3 messages are left out"]
    assert len(chat.messages) == 4  # the conversation itself is whole


def test_an_empty_reply_is_talk():
    shown, notes = [], []
    chat = answer(voice(max_bytes=0), new_chat(None, 0), "Hi", shown.append, notes.append)
    assert chat.messages[-1] == turn("assistant", "")
    assert shown == ["\n"]
    assert "empty reply" in notes[0]


def test_exit_and_the_end_of_the_lines_end_it():
    assert talk("Hi", "/exit", "more") == talk("Hi")


@pytest.mark.parametrize("line", ["/exit", "/exit ", "/exit now"])
def test_exit(line):
    assert obey(new_chat(None, 0), line)[0] is None


def test_help_lists_every_command():
    _, text = obey(new_chat(None, 0), "/help")
    for command in (
        "/reset",
        "/save FILE",
        "/seed N",
        "/temperature X",
        "/exit",
        "Ctrl-D",
        "/help",
    ):
        assert command in text


@pytest.mark.parametrize("line", ["/etc/passwd", "/", "/seed", "/seed x", "/save", "/RESET"])
def test_a_command_that_is_none_is_told_and_changes_nothing(line):
    chat = new_chat("Be kind.", 7)
    after, message = obey(chat, line)
    assert after == chat
    assert line.split()[0] in message


def test_a_space_before_the_slash_makes_it_a_message():
    chat, _, _ = talk(" /etc is a folder")
    assert chat.messages[0] == turn("user", "/etc is a folder")


def test_saved_is_what_the_primer_holds(tmp_path):
    path = tmp_path / "my chat.txt"
    chat, _, notes = talk("Hi", f"/save {path}", system="Be kind.")
    assert path.read_text(encoding="utf-8") + PROMPT == format_chat(chat.messages)
    assert str(path) in notes[-1]


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    path = tmp_path / "diary.txt"
    path.write_text("dear diary")
    _, _, notes = talk("Hi", f"/save {path}")
    assert path.read_text() == "dear diary"
    assert notes == [f"not saved: {path}: File exists"]


def test_a_place_that_cannot_be_written_is_told_and_the_chat_goes_on(tmp_path):
    (tmp_path / "file").touch()
    chat, _, notes = talk(f"/save {tmp_path}/file/chat.txt", "Hi")
    assert notes == [f"not saved: {tmp_path}/file/chat.txt: Not a directory"]
    assert len(chat.messages) == 2


@pytest.mark.parametrize("name", ["~no-such-user/talk.txt", "a\0b"])
def test_a_name_that_is_none_is_told_and_the_chat_goes_on(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    chat, _, notes = talk(f"/save {name}", "Hi")
    assert notes[0].startswith("not saved: ")
    assert len(chat.messages) == 2


def test_an_empty_reply_is_saved_as_one(tmp_path):
    chat = new_chat(None, 3)._replace(messages=(turn("user", "Hi"), turn("assistant", "")))
    _, told = obey(chat, f"/save {tmp_path / 'a.txt'}")
    assert told.startswith("saved 2 messages")
    assert (tmp_path / "a.txt").read_text() == "user: Hi\nassistant: \n"


# --- settings, and a reply that is stopped -----------------------------------------------------


def test_another_temperature_is_for_the_next_replies():
    cold, warm = voice(temperature=0), voice(temperature=1.0)
    assert talk("/temperature 0", "Hi", by=warm)[1] == talk("Hi", by=cold)[1]
    assert talk("/temperature 1.0", "Hi", by=cold)[1] == talk("Hi", by=warm)[1]
    assert talk("/temperature 0.25")[2] == ["temperature 0.25"]


@pytest.mark.parametrize("value", ["", "-1", "nan", "inf", "warm"])
def test_a_temperature_that_is_none_is_refused_and_changes_nothing(value):
    chat = new_chat(None, 3)
    after, message = obey(chat, f"/temperature {value}")
    assert after == chat
    assert message == f"/temperature needs a finite number of 0 or more, got {value!r}"


def interrupted(n):
    """Return a way to show that Ctrl-C interrupts at piece n, and what it has shown."""
    shown = []

    def show(piece):
        shown.append(piece)
        if len(shown) == n:
            raise KeyboardInterrupt

    return show, shown


def test_a_stopped_reply_stays_in_the_conversation_which_goes_on():
    show, shown = interrupted(3)
    notes = []
    chat = converse(voice(), new_chat(None, 1), ["Hi", "More"], show, notes.append, can_stop=True)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] == "".join(shown[:3])
    assert shown[3] == "\n"
    assert "reply stopped; Ctrl-C at the prompt leaves" in notes


def test_ctrl_c_ends_a_reply_and_all_else_where_nobody_can_go_on():
    show, _ = interrupted(3)
    with pytest.raises(KeyboardInterrupt):
        converse(voice(), new_chat(None, 1), ["Hi"], show, print)


@given(T=st.integers(1, 3000), max_bytes=st.integers(1, 1000))
def test_the_first_note_says_whether_two_turns_have_room(T, max_bytes):
    chat = new_chat("Be kind.", 0)
    line = turn("user", "y" * 40)
    two = [*chat.messages, line, turn("assistant", "z" * max_bytes), line]
    has_room = len(fit(two, prompt_room(T))) == len(two)
    by = Voice({}, ModelConfig(T=T, C=12, L=2, H=2, d_ff=16), Sampling(), max_bytes)
    note = first_note(by, chat)
    assert (note is None) == has_room
    if note and "--max-bytes" in note:
        kept = by._replace(max_bytes=int(note.split("--max-bytes ")[1].split()[0]))
        assert first_note(kept, chat) is None
        assert first_note(kept._replace(max_bytes=kept.max_bytes + 1), chat) is not None
