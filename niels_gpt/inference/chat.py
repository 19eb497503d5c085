"""A conversation: a prompt that fits the context, a reply that ends where the next turn starts."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from niels_gpt.chat_format import PROMPT, ROLES, format_chat
from niels_gpt.checkpoint import Checkpoint
from niels_gpt.config import ModelConfig
from niels_gpt.data import DIALOGUE_DELIM
from niels_gpt.inference.generate import Sampling, decode_stream, stream, window_start
from niels_gpt.optim.trees import Tree

Message = Mapping[str, str]  # role and content
Say = Callable[[str], object]

STOPS = (*(f"\n{role}: " for role in ROLES), DIALOGUE_DELIM.rstrip())
OPENING = DIALOGUE_DELIM.lstrip()  # what the dialogues of the primer follow

LINE = 40  # bytes of a message of ordinary length

HELP = """\
a line is a message or one of these commands:
  /reset          forget the conversation, keep the system message
  /seed N         use another seed for the next replies
  /temperature X  use another temperature for the next replies; 0: the most likely bytes
  /save FILE      write the conversation to a new file, in the format of the primer
  /exit           leave (or Ctrl-D)
  /help           list these commands
Ctrl-C stops a reply; where a line is expected, it leaves.
To send a message that starts with /, put a space before it."""


class Chat(NamedTuple):
    """A conversation so far."""

    messages: tuple[Message, ...]
    seed: int
    temperature: float | None = None  # of the next replies; None: the voice's


class Voice(NamedTuple):
    """The model that replies, and its settings."""

    params: Tree
    cfg: ModelConfig
    sampling: Sampling
    max_bytes: int  # of a reply


def new_chat(system: str | None, seed: int) -> Chat:
    """Start a conversation, with or without a system message."""
    return Chat((_message("system", system),) if system else (), seed)


# --- one turn ----------------------------------------------------------------------------------


def prompt_room(T: int) -> int:
    """Return how many bytes of a context of T the prompt may fill: a quarter is for the reply."""
    return T - T // 4


def fit(messages: Sequence[Message], room: int) -> list[Message]:
    """Return the latest turns whose prompt fits into `room` bytes.

    The oldest exchanges are dropped first, each a user's message and everything up to the next
    one. The leading system messages stay unless the last exchange needs their room; the last
    exchange always stays.
    """
    n_system = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    system, turns = list(messages[:n_system]), list(messages[n_system:])
    starts = [i for i, message in enumerate(turns) if i == 0 or message["role"] == "user"]
    before = list(accumulate(map(_turn_bytes, turns), initial=0))
    whole = _prompt_bytes(messages)
    if (first := next((i for i in starts if whole - before[i] <= room), None)) is not None:
        return system + turns[first:]
    return turns[starts[-1] :] if starts else system


def prompt_of(messages: Sequence[Message], T: int) -> bytes:
    """Return what a model with a context of T bytes reads: the turns that fit, as in the primer.

    There, a dialogue follows a delimiter, so the prompt starts with one if there is room for it.
    """
    room = prompt_room(T)
    turns = format_chat(fit(messages, room)).encode()
    opened = OPENING.encode() + turns
    return opened if len(opened) <= room else turns


def generated(voice: Voice, chat: Chat) -> Iterator[str]:
    """Yield what the model writes after the prompt, past the end of its reply, in pieces.

    The draws depend on (seed, turn).
    """
    turn = sum(message["role"] == "assistant" for message in chat.messages)
    sampling = voice.sampling
    if chat.temperature is not None:
        sampling = replace(sampling, temperature=chat.temperature)
    chunks = stream(
        voice.params,
        voice.cfg,
        prompt_of(chat.messages, voice.cfg.T),
        voice.max_bytes,
        seed=chat.seed,
        samples=(turn,),
        sampling=sampling,
        purpose="chat",
    )
    return decode_stream(chunks)


def reply_stream(voice: Voice, chat: Chat) -> Iterator[str]:
    """Yield the reply to the last message in pieces."""
    return visible(generated(voice, chat))


def visible(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the parts of a reply that can be shown as it grows; end where the next turn starts.

    Text that may turn out to be a stop, and white space that may be the last, is held back. The
    pieces joined are `extract_assistant_reply` of the text before the first stop.
    """
    return _stripped(_before_stop(pieces))


def _before_stop(pieces: Iterable[str]) -> Iterator[str]:
    held = ""
    for piece in pieces:
        held += piece
        cut = first_stop(held)
        end = len(held) - _held_back(held) if cut is None else cut
        yield held[:end]
        if cut is not None:
            return
        held = held[end:]
    yield held


def _stripped(pieces: Iterable[str]) -> Iterator[str]:
    """Yield what all pieces joined and stripped are, in pieces that do not end in white space."""
    blank: list[str] = []  # white space since the last character that was shown
    started = False
    for piece in pieces:
        text = piece if started else piece.lstrip()
        if body := text.rstrip():
            yield "".join([*blank, body])
            started, blank = True, []
        if started:
            blank.append(text[len(body) :])


def first_stop(text: str) -> int | None:
    """Return where the reply at the start of a text ends; None if it does not."""
    return min((i for i in map(text.find, STOPS) if i >= 0), default=None)


def _held_back(text: str) -> int:
    """Return the length of the longest suffix of the text that is the start of a stop."""
    longest = max(map(len, STOPS)) - 1
    ends = (text[len(text) - n :] for n in range(min(longest, len(text)), 0, -1))
    return next((len(end) for end in ends if any(stop.startswith(end) for stop in STOPS)), 0)


def _prompt_bytes(messages: Sequence[Message]) -> int:
    return len(format_chat(messages).encode())


def _turn_bytes(message: Message) -> int:
    return _prompt_bytes([message, _message("assistant", "")]) - len(PROMPT)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


# --- the conversation --------------------------------------------------------------------------


def answer(
    voice: Voice, chat: Chat, text: str, show: Say, tell: Say, *, can_stop: bool = False
) -> Chat:
    """Send `text`, show the reply as it is generated, and return the chat with both.

    With `can_stop`, Ctrl-C ends the reply; what was generated of it stays in the chat.
    """
    asked = chat._replace(messages=(*chat.messages, _message("user", text)))
    for note in context_notes(asked.messages, voice.cfg.T):
        tell(note)
    reply, outcome = "", ""
    try:
        for piece in reply_stream(voice, asked):
            reply += piece
            show(piece)
    except KeyboardInterrupt:
        if not can_stop:
            raise
        outcome = "reply stopped; Ctrl-C at the prompt leaves"
    show("\n")
    if not reply:
        outcome = outcome or "empty reply; try another seed or a higher temperature"
    if outcome:
        tell(outcome)
    return asked._replace(messages=(*asked.messages, _message("assistant", reply)))


def first_note(voice: Voice, chat: Chat) -> str | None:
    """Return a message if the second turn will hardly have room beside the first."""
    T, longest = voice.cfg.T, voice.max_bytes
    line = _message("user", "x" * LINE)
    two_turns = (*chat.messages, line, _message("assistant", "x"), line)
    room = prompt_room(T) - _prompt_bytes(two_turns) + 1
    if longest <= room:
        return None
    what = f"the context of {T} bytes is too short for two turns"
    if room < LINE:
        return (
            f"{what}: the model will see little or nothing of the conversation before each message"
        )
    return (
        f"{what} with replies of up to {longest} bytes: the first will be left out; "
        f"--max-bytes {room} keeps it beside lines of {LINE} bytes"
    )


def knows_dialogues(trained: Checkpoint) -> bool:
    """Return whether the model's last training had dialogues, or may have had."""
    shares = trained.train_cfg.get("p_train")
    return not isinstance(shares, Mapping) or bool(shares.get("primer"))


def context_notes(messages: Sequence[Message], T: int) -> list[str]:
    """Return messages about the parts of the conversation that the model will not see."""
    kept = fit(messages, prompt_room(T))
    full = f"the context of {T} bytes is full"
    notes = []
    if left_out := len(messages) - len(kept):
        notes.append(f"{full}: the oldest {left_out} of {len(messages)} messages are left out")
    if unseen := window_start(n := _prompt_bytes(kept), T):
        notes.append(f"{full}: only the last {n - unseen} of {n} bytes of the last turn are seen")
    return notes


def obey(chat: Chat, line: str) -> tuple[Chat | None, str]:
    """Run a `/` command: return the new chat (None to leave) and the message to show."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    match command:
        case "/exit":
            return None, ""
        case "/help":
            return chat, HELP
        case "/reset":
            system = tuple(m for m in chat.messages if m["role"] == "system")
            return chat._replace(messages=system), "conversation forgotten"
        case "/seed":
            return _reseeded(chat, argument)
        case "/temperature":
            return _reheated(chat, argument)
        case "/save":
            return chat, _saved(chat, argument)
    return chat, f"unknown command {command}; /help lists the commands"


def _reseeded(chat: Chat, argument: str) -> tuple[Chat, str]:
    try:
        seed = int(argument)
    except ValueError:
        return chat, f"/seed needs an integer, got {argument!r}"
    return chat._replace(seed=seed), f"seed {seed}"


def _reheated(chat: Chat, argument: str) -> tuple[Chat, str]:
    try:
        temperature = Sampling(float(argument)).temperature
    except ValueError:
        return chat, f"/temperature needs a finite number of 0 or more, got {argument!r}"
    return chat._replace(temperature=temperature), f"temperature {temperature:g}"


def _saved(chat: Chat, argument: str) -> str:
    if not argument:
        return "/save needs a file name"
    path = Path(os.path.expanduser(argument))
    prompted = format_chat((*chat.messages, {"role": "assistant", "content": ""}))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(prompted.removesuffix(PROMPT))
    except OSError as error:
        return f"not saved: {path}: {error.strerror}"
    except ValueError as error:  # a NUL byte in the name
        return f"not saved: {argument!r}: {error}"
    return f"saved {len(chat.messages)} messages to {path}"


def converse(
    voice: Voice,
    chat: Chat,
    lines: Iterable[str],
    show: Say,
    tell: Say,
    *,
    can_stop: bool = False,
) -> Chat:
    """Reply to each line until the end or /exit; return the conversation. See `answer`."""
    for line in lines:
        if line.startswith("/"):
            obeyed, outcome = obey(chat, line.strip())
            if outcome:
                tell(outcome)
            if obeyed is None:
                return chat
            chat = obeyed
        elif text := line.strip():
            chat = answer(voice, chat, text, show, tell, can_stop=can_stop)
    return chat
