"""The checker of chat counts what it says, on texts whose counts are known."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import replies
from benchmarks.replies import LIMIT, Reply, count, cut, repeats_a_phrase, words_of
from niels_gpt import paths
from niels_gpt.config import ModelConfig
from niels_gpt.inference.chat import STOPS, Voice
from niels_gpt.inference.generate import Sampling
from tests.trained import SMALL, lively_state, save_lively

PRIMER = paths.PRIMER_PATH.read_text(encoding="utf-8")
SHORT = ModelConfig(T=64, C=12, L=1, H=2, d_ff=16)


@pytest.mark.parametrize("stop", STOPS)
def test_a_reply_ends_where_chat_ends_it(stop):
    assert cut("Hi", f" Hello there. {stop}more") == Reply("Hi", "Hello there.", True)
    assert cut("Hi", " Hello there. ") == Reply("Hi", "Hello there.", False)


@given(n=st.integers(0, LIMIT + 30))
def test_an_end_counts_within_the_limit_and_after_at_least_a_character(n):
    assert cut("", "x" * n + STOPS[0]).ended == (0 < n <= LIMIT)


def test_the_limit_is_in_bytes():
    assert cut("", "é" * (LIMIT // 2) + STOPS[0]).ended
    assert not cut("", "é" * (LIMIT // 2 + 1) + STOPS[0]).ended


def test_words_are_letters_with_inner_apostrophes_and_hyphens():
    assert words_of("It\u2019s 7 o'clock, 'well-known' Zo\u00eb_x!") == [
        *("it's", "o'clock", "well-known", "zo\u00eb", "x")
    ]


def test_a_phrase_repeats_if_four_words_in_a_row_occur_twice():
    assert repeats_a_phrase("The old dog sat. the old, dog SAT")
    assert repeats_a_phrase("no no no no no")
    assert not repeats_a_phrase("the old dog sat and the old dog ran")
    assert not repeats_a_phrase("")


def test_counts():
    given = [
        Reply("a", "Hello my friend", True),
        Reply("b", "Hello zlorp hello zlorp hello zlorp", True),
        Reply("c", "my friend is her", False),  # the last word may be cut
    ]
    found = count(given, "assistant: Hello my friend\n", {"hello", "my", "friend", "is"})
    assert found._replace(mean_bytes=0) == (3, 2, 12, 9, 1, 1, 0, ("zlorp",))
    assert found.mean_bytes == pytest.approx((15 + 35 + 16) / 3)
    rows = "\n".join(replies.table(found))
    assert "| 2 of 3 | 66.7% |" in rows
    assert "| 9 of 12 | 75.0% |" in rows


def test_no_replies_are_no_division_by_zero():
    assert count([], "", ()).mean_bytes == 0
    assert replies.table(count([], "", ()))


def plain(text):
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def test_the_prompts_are_sixty_and_none_is_in_the_primer():
    prompts = replies.load_prompts()
    said = {plain(line.partition(": ")[2]) for line in PRIMER.splitlines()}
    assert len(set(map(plain, prompts))) == 60
    assert [p for p in prompts if plain(p) in said] == []
    assert [p for p in prompts if p in PRIMER or p != p.strip()] == []


def test_replies_depend_on_seed_and_prompt_only():
    voice = Voice(lively_state(SHORT).params, SHORT, Sampling(), 20)
    both = list(replies.replies_of(voice, ["Hi", "Hi"], 1))
    assert both == list(replies.replies_of(voice, ["Hi", "Hi"], 1))
    assert both[0] != both[1]
    assert both != list(replies.replies_of(voice, ["Hi", "Hi"], 2))


def test_the_command_prints_the_table_and_transcripts(tmp_path, monkeypatch):
    ckpt = str(save_lively(tmp_path / "best.pt", SMALL))
    monkeypatch.setattr(replies, "load_prompts", lambda: ["Hi", "Who are you?"])
    result = CliRunner().invoke(replies.main, [ckpt, "--transcripts", "1"])
    assert result.exit_code == 0, result.output
    assert "| 2 replies | | |" in result.stdout
    assert "> Hi\n" in result.stdout
    assert "> Who" not in result.stdout
    value = json.loads(CliRunner().invoke(replies.main, [ckpt, "--json"]).stdout)
    assert [text["prompt"] for text in value["texts"]] == ["Hi", "Who are you?"]


def test_a_checkpoint_that_is_absent_is_refused_by_name(tmp_path):
    result = CliRunner().invoke(replies.main, [str(tmp_path / "none.pt")])
    assert result.exit_code == 2
    assert "none.pt" in result.stderr
