"""Conversations: what is formatted can be read back, and the prompt comes out exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.chat_format import ROLES, extract_assistant_reply, format_chat

TAGS = tuple(f"{role}: " for role in ROLES)


def has_no_tag(text):
    return not any(line.startswith(TAGS) for line in text.split("\n"))


contents = st.text(max_size=30).filter(has_no_tag)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": contents}), max_size=6
)


def turn(role, content):
    return {"role": role, "content": content}


def test_a_conversation_as_text():
    chat = [turn("system", "Be kind."), turn("user", "Hi"), turn("assistant", "Hello!")]
    text = "system: Be kind.\nuser: Hi\nassistant: Hello!\n"
    assert format_chat(chat) == text + "assistant: "
    assert format_chat([*chat, turn("user", "")]) == text + "user: \nassistant: "
    assert format_chat([]) == "assistant: "


def test_an_empty_last_reply_is_the_prompt_itself():
    asked = [turn("user", "Hi")]
    assert format_chat([*asked, turn("assistant", "")]) == format_chat(asked)
    assert format_chat([*asked, turn("assistant", ""), *asked]) == (
        "user: Hi\nassistant: \nuser: Hi\nassistant: "
    )


@given(messages)
def test_every_turn_is_there_in_order_and_the_prompt_ends_it(chat):
    text = format_chat(chat)
    if chat and chat[-1] == turn("assistant", ""):
        chat = chat[:-1]
    for message in chat:
        line = f"{message['role']}: {message['content']}\n"
        assert text.startswith(line)
        text = text[len(line) :]
    assert text == "assistant: "


@given(messages)
def test_formatting_leaves_the_messages_alone(chat):
    before = [dict(message) for message in chat]
    format_chat(chat)
    assert chat == before


@given(messages, contents)
def test_a_generated_reply_is_read_back(chat, reply):
    expected = [m["content"].strip() for m in chat if m["role"] == "assistant"] + [reply.strip()]
    last = next((content for content in reversed(expected) if content), "")
    assert extract_assistant_reply(format_chat(chat) + reply) == last


@given(messages, contents, st.sampled_from(["user: ", "system: "]), contents)
def test_a_reply_ends_where_the_next_turn_begins(chat, reply, tag, rest):
    text = format_chat(chat) + f"x{reply}\n{tag}{rest}"
    assert extract_assistant_reply(text) == f"x{reply}".strip()


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("assistant: hi", "hi"),
        ("user: a\nassistant: one\nuser: b\nassistant:   two \n\nuser: c\n", "two"),
        ("assistant: one\nassistant: \nassistant:  \n", "one"),
        ("assistant: one\nassistant: two", "two"),
        ("assistant: \nuser: x\nassistant: ", ""),
        ("assistant: ", ""),
        ("assistant: a\nb: c\nuser:d", "a\nb: c\nuser:d"),
        ("assistant: I am an assistant: helpful", "I am an assistant: helpful"),
        ("user: what is an assistant: a person?\nassistant: one who helps", "one who helps"),
        ("cut window assistant: still found\nuser: x", "still found"),
    ],
)
def test_the_last_reply_that_says_something(text, reply):
    assert extract_assistant_reply(text) == reply


@given(st.text().filter(lambda text: "assistant: " not in text))
def test_without_the_tag_there_is_no_reply(text):
    with pytest.raises(ValueError, match="assistant: "):
        extract_assistant_reply(text)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "Assistant", "content": "x"},
        {"role": "tool", "content": "x"},
        {"role": "", "content": "x"},
        {"role": None, "content": "x"},
        {"content": "x"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": b"x"},
    ],
)
def test_a_wrong_message_is_refused_with_its_place(message):
    with pytest.raises(ValueError, match="message 1 must have a role system, user or assi"):
        format_chat([turn("user", "hi"), message])
