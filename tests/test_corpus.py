"""The text of a run: each batch is a function of the corpus and k, each row's source is known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt import ModelConfig, TrainConfig, paths
from niels_gpt.corpus import Corpus, open_corpus
from niels_gpt.data.sources import Given
from niels_gpt.step import batch_of_step
from niels_gpt.streams import locate

texts_by_name = st.dictionaries(
    st.sampled_from(["wiki", "roam", "primer"]), st.binary(min_size=9, max_size=40), min_size=1
)


def corpus_of(train, **more):
    p = {name: 1 / len(train) for name in train}
    return Corpus(**{"train": train, "val": {}, "p": p, "seed": 7, "B": 5, "T": 8, **more})


@given(texts_by_name, st.integers(0, 50))
def test_the_rows_are_where_the_batch_was_cut(train, k):
    corpus = corpus_of(train)
    x, y = corpus.batch(k)
    rows = corpus.rows(k)
    assert [row.row for row in rows] == list(range(5))
    for row, before, after in zip(rows, x, y, strict=True):
        window = train[row.source][row.start : row.start + 9]
        assert window == bytes([*before.tolist(), int(after[-1])])
        assert row.text == window.decode(errors="replace")


def test_a_note_that_quotes_the_wiki_is_shown_as_the_note():
    quoted = "The Danube rises in the Black Forest."
    both = {"wiki": quoted.encode(), "roam": f"> {quoted}\n".encode()}
    of_notes = corpus_of(both, p={"wiki": 0.0, "roam": 1.0}).rows(0)
    assert {row.source for row in of_notes} == {"roam"}
    assert any(row.text in quoted for row in of_notes)
    assert {row.source for row in corpus_of(both, p={"wiki": 1.0, "roam": 0.0}).rows(0)} == {"wiki"}


def test_batch_k_is_that_of_the_step():
    corpus = corpus_of({"wiki": bytes(range(200)), "roam": bytes(50)})
    for k in (0, 3):
        wanted = batch_of_step(7, k, corpus.train, p=corpus.p, B=5, T=8)
        for a, b in zip(corpus.batch(k), wanted, strict=True):
            assert torch.equal(a, b)


def test_the_share_of_an_absent_source_goes_to_the_others(texts, monkeypatch):
    monkeypatch.setattr(paths, "ROAM_DIR", texts / "nowhere")
    cfg = TrainConfig(seed=3, B=6, p_train={"wiki": 0.6, "roam": 0.3, "primer": 0.1})
    where = locate(Given({"wiki": texts / "wiki"}), write_cache=False)
    corpus = open_corpus(ModelConfig(T=20, C=8, H=2), cfg, where)
    assert (corpus.seed, corpus.B, corpus.T) == (3, 6, 20)
    assert corpus.p == {"wiki": pytest.approx(6 / 7), "primer": pytest.approx(1 / 7)}
    (message,) = corpus.messages
    assert message.startswith("roam: left out (no notes (*.md): ")
    assert message.endswith("; the shares are now wiki 0.8571, primer 0.1429")


def test_a_checkpoint_keeps_of_the_sources_what_is_the_same_on_every_machine(texts):
    where = locate(Given({"wiki": texts / "wiki", "roam": texts / "notes"}), write_cache=False)
    corpus = open_corpus(ModelConfig(T=20, C=8, H=2), TrainConfig(), where)
    info = corpus.sources["train"]["roam"]
    assert info.place == str(texts / "notes")
    assert corpus.record["train"]["roam"] == {
        "origin": "notes",
        "bytes": len(corpus.train["roam"]),
        "sha256": info.sha256,
    }
    assert list(corpus.record) == ["train", "val"]
