"""The shipped primer: enough text, all of it short and well-formed conversations."""

import operator
import re
from collections import Counter

import pytest

from niels_gpt import paths
from niels_gpt.chat_format import ROLES, extract_assistant_reply, format_chat
from niels_gpt.data import DIALOGUE_DELIM

TEXT = paths.PRIMER_PATH.read_bytes().decode("utf-8")
DIALOGUES = TEXT.rstrip("\n").split(DIALOGUE_DELIM)
TURN = re.compile(r"^(system|user|assistant): ", re.MULTILINE)
SUM = re.compile(r"(\d+) (plus|minus|times) (\d+)(?:(?:,? which)? is (\d+))?")
OPERATIONS = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}


def parse(dialogue):
    parts = TURN.split(dialogue)
    assert parts[0] == "", "a dialogue begins with a turn"
    return [
        {"role": role, "content": content.removesuffix("\n")}
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def said(role):
    return [m["content"] for d in DIALOGUES for m in parse(d) if m["role"] == role]


def sums(text):
    """Yield (the sum as written, its true result, the result it states or None)."""
    for match in SUM.finditer(text):
        a, operation, b, stated = match.groups()
        yield match[0], OPERATIONS[operation](int(a), int(b)), stated and int(stated)


def test_there_is_enough_of_it():
    assert len(TEXT.encode("utf-8")) >= 120_000
    assert len(DIALOGUES) >= 400


def test_it_has_variety():
    chats = [parse(dialogue) for dialogue in DIALOGUES]
    assert sum(chat[0]["role"] == "system" for chat in chats) >= 20
    assert sum(len(chat) > 3 for chat in chats) >= 200
    assert [d for d, n in Counter(DIALOGUES).items() if n > 1] == []
    assert [reply for reply, n in Counter(said("assistant")).items() if n > 3] == []


@pytest.mark.parametrize("dialogue", DIALOGUES, ids=range(len(DIALOGUES)))
def test_every_dialogue_is_in_the_chat_format(dialogue):
    chat = parse(dialogue)
    assert format_chat(chat) == f"{dialogue}\nassistant: "
    assert extract_assistant_reply(dialogue) == chat[-1]["content"]
    roles = [message["role"] for message in chat]
    if roles[0] == ROLES[0]:
        roles = roles[1:]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert all(message["content"].strip() == message["content"] != "" for message in chat)
    assert not any("\n" in message["content"] for message in chat), "a turn is one line"


def test_replies_are_short():
    assert [reply for reply in said("assistant") if len(reply.encode("utf-8")) > 300] == []


def test_sums_are_right():
    replies = said("assistant")
    stated = [found for reply in replies for found in sums(reply) if found[2] is not None]
    assert len(stated) >= 40
    assert [written for written, result, claim in stated if claim != result] == []
    asked = [
        (question, reply, result)
        for question, reply in zip(said("user"), replies, strict=True)
        for written, result, _ in sums(question)
        if max(map(int, re.findall(r"\d+", written))) <= 100
    ]
    assert len(asked) >= 20
    assert [a for a in asked if str(a[2]) not in re.findall(r"\d+", a[1])] == []


def test_lines_are_clean():
    assert TEXT.isascii()
    assert "\r" not in TEXT
    assert "\t" not in TEXT
    assert not re.search(r" $|  ", TEXT, re.MULTILINE)
    assert TEXT.endswith("\n")
    assert not TEXT.endswith("\n\n")
