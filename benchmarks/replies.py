"""Whether a chat answers: what the replies to 60 prompts that are not in the primer look like.

    python -m benchmarks.replies checkpoints/chat/best.pt --text data/wiki/train.txt

Counts replies that end by themselves, words that occur in the training text, and repeated phrases.
Prompt i is the first message of a chat of its own, whose seed is keyed by (seed, i).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import torch

from niels_gpt import paths
from niels_gpt.cli.shared.output import exit_on_failure
from niels_gpt.data import load_primer_text, load_texts
from niels_gpt.inference.chat import STOPS, Chat, Voice, first_stop, generated
from niels_gpt.inference.generate import Sampling
from niels_gpt.inference.load import load_model
from niels_gpt.rng import derive_seed

PROMPTS = Path(__file__).with_name("prompts.txt")
LIMIT = 200  # bytes within which a reply is to end
PHRASE = 4  # words
WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")


class Reply(NamedTuple):
    """What a model wrote after a prompt, up to the end of its reply."""

    prompt: str
    text: str  # stripped, as chat shows it
    ended: bool  # by itself, within `LIMIT` bytes


class Count(NamedTuple):
    """What was counted over all replies."""

    replies: int
    ended: int  # by themselves, and not empty
    words: int
    known: int  # of the words
    repeating: int  # replies in which a phrase of `PHRASE` words occurs twice
    copied: int  # replies that are in the training text as they stand
    mean_bytes: float
    unknown: tuple[str, ...]  # the words that are not known, once each


def cut(prompt: str, written: str) -> Reply:
    """Return the reply at the start of what a model wrote."""
    end = first_stop(written)
    text = written[:end].strip()
    within = end is not None and len(written[:end].encode()) <= LIMIT
    return Reply(prompt, text, within and bool(text))


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case: letters, with inner apostrophes and hyphens."""
    return [word.replace("\u2019", "'") for word in WORD.findall(text.lower())]


def whole_words(reply: Reply) -> list[str]:
    """Return the words of a reply, without the last one if the limit may have cut it."""
    words = words_of(reply.text)
    return words if reply.ended else words[:-1]


def repeats_a_phrase(text: str) -> bool:
    """Return whether a sequence of `PHRASE` words occurs twice in a text."""
    words = words_of(text)
    phrases = [tuple(words[i : i + PHRASE]) for i in range(len(words) - PHRASE + 1)]
    return len(set(phrases)) < len(phrases)


def count(replies: Sequence[Reply], text: str, vocabulary: Collection[str]) -> Count:
    """Count over replies; `text` is the primer, `vocabulary` the words of all training text."""
    words = [word for reply in replies for word in whole_words(reply)]
    unknown = [word for word in words if word not in vocabulary]
    return Count(
        replies=len(replies),
        ended=sum(reply.ended for reply in replies),
        words=len(words),
        known=len(words) - len(unknown),
        repeating=sum(repeats_a_phrase(reply.text) for reply in replies),
        copied=sum(f": {reply.text}\n" in text for reply in replies),
        mean_bytes=sum(len(reply.text.encode()) for reply in replies) / max(1, len(replies)),
        unknown=tuple(dict.fromkeys(unknown)),
    )


def ask(voice: Voice, prompt: str, seed: int) -> Reply:
    """Send a prompt as the first message of a chat; stop where its reply ends."""
    written = ""
    for piece in generated(voice, Chat(({"role": "user", "content": prompt},), seed)):
        written += piece
        if first_stop(written) is not None:
            break
    return cut(prompt, written)


def replies_of(voice: Voice, prompts: Sequence[str], seed: int) -> Iterator[Reply]:
    """Yield the reply to each prompt."""
    for i, prompt in enumerate(prompts):
        yield ask(voice, prompt, derive_seed(seed, "prompt", i))


def table(c: Count) -> list[str]:
    """Format the counts as a Markdown table."""
    rows = [
        (f"end by themselves within {LIMIT} bytes", c.ended, c.replies),
        ("words that occur in the training text", c.known, c.words),
        (f"replies that repeat a phrase of {PHRASE} words", c.repeating, c.replies),
        ("replies copied from the primer", c.copied, c.replies),
    ]
    lines = [f"| {what} | {n} of {of} | {n / max(1, of):.1%} |" for what, n, of in rows]
    mean = f"| mean length | {c.mean_bytes:.0f} bytes | |"
    return [f"| {c.replies} replies | | |", "| --- | --- | --- |", *lines, mean]


def transcript(reply: Reply) -> list[str]:
    """Format a prompt and its reply as chat shows them; say so if the reply did not end."""
    return [f"> {reply.prompt}", reply.text, *["(did not end)"] * (not reply.ended), ""]


def load_prompts() -> list[str]:
    """Return the prompts, one a line of the file beside this one."""
    return PROMPTS.read_text(encoding="utf-8").splitlines()


@click.command()
@click.argument("ckpt", type=click.Path(path_type=Path))
@click.option(
    "--text",
    "texts",
    type=click.Path(exists=True, dir_okay=False),
    multiple=True,
    help="Other training text than the primer; repeatable.",
)
@click.option("--temperature", type=float, default=0.8, show_default=True, help="As of chat.")
@click.option("--seed", type=int, default=42, show_default=True)
@click.option("--transcripts", type=click.IntRange(0, 60), default=0, help="Replies to print.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts and every reply as JSON.")
def main(
    ckpt: Path,
    texts: tuple[str, ...],
    temperature: float,
    seed: int,
    transcripts: int,
    as_json: bool,
) -> None:
    """Print what the replies of a model to 60 prompts look like; about a minute."""
    torch.set_num_threads(1)
    with exit_on_failure(2):
        trained = load_model(ckpt)
        primer = load_primer_text(paths.primer_path())
        vocabulary = set(words_of("\n".join([primer, *load_texts(texts)])))
        longest = LIMIT + max(map(len, STOPS))
        voice = Voice(trained.params, trained.cfg, Sampling(temperature), longest)
    replies = list(replies_of(voice, load_prompts(), seed))
    counted = count(replies, primer + "\n", vocabulary)
    if as_json:
        value = {**counted._asdict(), "texts": [reply._asdict() for reply in replies]}
        click.echo(json.dumps(value, indent=2))
        return
    click.echo("\n".join(table(counted)))
    click.echo(f"words that do not occur: {', '.join(counted.unknown) or 'none'}\n")
    for i in range(min(transcripts, len(replies))):
        click.echo("\n".join(transcript(replies[i * len(replies) // transcripts])))


if __name__ == "__main__":
    main()
