"""Conversations as text: one turn is `"{role}: {content}\\n"`."""

import re
from collections.abc import Mapping, Sequence

ROLES = ("system", "user", "assistant")
PROMPT = "assistant: "

_TURN_END = re.compile(r"\n(?:system|user|assistant): ")
_REPLY_AT_LINE_START = re.compile(r"^assistant: ", re.MULTILINE)


def format_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """Return the turns of `messages`, each with `role` and `content`, ending in the prompt.

    A final empty assistant message is that prompt.

    Raises:
        ValueError: for an unknown role or a content that is not a string, naming the message.
    """
    for index, message in enumerate(messages):
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise ValueError(
                f"message {index} must have a role system, user or assistant and a string content, "
                f"got {dict(message)!r}"
            )
    turns = [(message["role"], message["content"]) for message in messages]
    if turns and turns[-1] == ("assistant", ""):
        turns.pop()
    return "".join(f"{role}: {content}\n" for role, content in turns) + PROMPT


def extract_assistant_reply(text: str) -> str:
    """Return the last non-empty reply, stripped, up to the next turn; "" if all are empty.

    A reply starts after `assistant: ` at the start of a line. If no line starts with it, as in a
    window cut out of a conversation, a reply starts after `assistant: ` anywhere.

    Raises:
        ValueError: if there is no `assistant: `.
    """
    starts = [match.end() for match in _REPLY_AT_LINE_START.finditer(text)]
    starts = starts or [match.end() for match in re.finditer(re.escape(PROMPT), text)]
    if not starts:
        raise ValueError(f"no {PROMPT!r} in the text, so there is no reply to extract")
    for start in reversed(starts):
        end = _TURN_END.search(text, start)
        reply = text[start : end.start() if end else len(text)].strip()
        if reply:
            return reply
    return ""
