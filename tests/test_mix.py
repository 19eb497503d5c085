"""Shares as the user gives them, and what the program chooses without them."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.config import SOURCE_NAMES, ConfigDocument, TrainConfig
from niels_gpt.data.sources import Given
from niels_gpt.mix import may_choose_val, parse_mix, with_mix, written

shares = st.dictionaries(
    st.sampled_from(SOURCE_NAMES), st.floats(0, 1e9, allow_subnormal=False), min_size=1
).filter(lambda mix: sum(mix.values()) > 1e-200)


@given(shares)
def test_shares_are_scaled_to_one_and_read_back_as_they_are_written(mix):
    """So that a resumed run draws from the same shares, bit for bit."""
    parsed = parse_mix(written(mix))
    assert math.isclose(math.fsum(parsed.values()), 1)
    assert parse_mix(written(parsed)) == parsed
    TrainConfig(p_train=parsed)
    largest = max(mix, key=mix.__getitem__)
    assert parsed[largest] == pytest.approx(mix[largest] / math.fsum(mix.values()))


def test_a_source_may_be_called_by_its_option():
    assert parse_mix(" notes = 3 , text=1") == {"roam": 0.75, "text": 0.25}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not NAME=SHARE, as in text=0.9,primer=0.1"),
        ("text", "'text' is not NAME=SHARE"),
        ("text=1,", "'' is not NAME=SHARE"),
        ("txt=1", "unknown source 'txt' (did you mean text?)"),
        ("=1", "unknown source ''"),
        ("text=-0.1", "text=-0.1 is not a share: it must be a number from 0"),
        ("text=nan", "text=nan is not a share"),
        ("text=1e300,wiki=1", "text=1e300 is not a share"),
        ("text=a", "text=a is not a share"),
        ("text=0,wiki=0.0", "no share is positive"),
        ("roam=1,notes=1", "notes is given twice"),
    ],
)
def test_a_mix_that_means_nothing_is_refused(niels, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_mix(text)
    said = niels("train", "--config", "quick", "--mix", text)
    assert (said.exit_code, said.stdout) == (2, "")
    assert message in " ".join(said.stderr.split())


def mixed(p_train=None, mix=None, **places):
    return with_mix(TrainConfig(p_train=p_train), Given(places, mix)).p_train


def test_without_a_share_a_text_that_is_named_is_trained_on_with_what_else_is_named():
    assert mixed(text="a") == {"text": 1.0}
    assert mixed(text="a", roam="b") == {"text": 0.5, "roam": 0.5}
    assert mixed(roam="b") == TrainConfig().p_train
    assert mixed({"text": 0.5, "wiki": 0.5}, text="a", roam="b") == {"text": 0.5, "wiki": 0.5}
    assert mixed(text="a", mix={"wiki": 1.0}) == {"wiki": 1.0}


def test_the_source_that_judges_may_be_chosen_where_no_one_asks_for_wiki():
    own, wiki = TrainConfig(p_train={"text": 1.0}), TrainConfig(p_train={"text": 0.9, "wiki": 0.1})
    document, none = ConfigDocument("c.json", {}), Given()
    assert may_choose_val(own, none, document)
    assert may_choose_val(own, none, None)
    assert not may_choose_val(wiki, none, document)
    assert not may_choose_val(own, Given({"wiki": "w"}), document)
    assert not may_choose_val(own, none, document, ["train.val_source=wiki"])
    assert not may_choose_val(own, none, ConfigDocument("c", {"train": {"val_source": "wiki"}}))
