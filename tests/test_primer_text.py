"""The shipped primer: enough text, all of it well-formed conversations."""

import re

import pytest

from niels_gpt import paths
from niels_gpt.chat_format import ROLES, extract_assistant_reply, format_chat
from niels_gpt.data import DIALOGUE_DELIM

TEXT = paths.PRIMER_PATH.read_bytes().decode("utf-8")
DIALOGUES = TEXT.rstrip("\n").split(DIALOGUE_DELIM)
TURN = re.compile(r"^(system|user|assistant): ", re.MULTILINE)


def parse(dialogue):
    parts = TURN.split(dialogue)
    assert parts[0] == "", "a dialogue begins with a turn"
    return [
        {"role": role, "content": content.removesuffix("\n")}
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def test_there_is_enough_of_it():
    assert len(TEXT.encode("utf-8")) >= 20_000
    assert len(DIALOGUES) >= 60
    assert len(set(DIALOGUES)) == len(DIALOGUES)


def test_it_has_variety():
    chats = [parse(dialogue) for dialogue in DIALOGUES]
    assert sum(chat[0]["role"] == "system" for chat in chats) >= 4
    assert sum(len(chat) > 3 for chat in chats) >= 20
    replies = [m["content"] for chat in chats for m in chat if m["role"] == "assistant"]
    assert len(set(replies)) == len(replies)


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


def test_lines_are_clean():
    assert "\r" not in TEXT
    assert "\t" not in TEXT
    assert not re.search(r" $", TEXT, re.MULTILINE)
    assert TEXT.endswith("\n")
    assert not TEXT.endswith("\n\n")
