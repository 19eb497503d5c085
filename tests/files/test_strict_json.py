"""Strict JSON: read back as saved, and refused where `json` would guess."""

import json
import math

import pytest
from hypothesis import given

from niels_gpt.files.strict_json import load_json, parse_json, save_json
from tests.strategies import json_values


@given(json_values)
def test_saved_json_is_read_back(tmp_path, value):
    path = tmp_path / "x.json"
    save_json(path, value)
    assert load_json(path) == value


def test_saved_json_is_for_people(tmp_path):
    path = tmp_path / "x.json"
    save_json(path, {"b": "é", "a": [1]})
    assert path.read_bytes() == '{\n  "a": [\n    1\n  ],\n  "b": "é"\n}\n'.encode()


@pytest.mark.parametrize("bad", [math.nan, object(), "\ud800", {1: 2, "a": 3}])
def test_what_json_cannot_hold_leaves_the_file_alone(tmp_path, bad):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises((ValueError, TypeError)):
        save_json(path, bad)
    assert path.read_text() == "old"


@pytest.mark.parametrize("text", ["[NaN]", "-Infinity", '{"a": 1, "a": 1}'])
def test_json_itself_is_stricter_than_pythons(text):
    json.loads(text)
    with pytest.raises(ValueError, match=r"not a number|more than once"):
        parse_json(text)


def test_numbers_keep_their_kind():
    assert [type(v) for v in parse_json("[1, 1.0, 1e2, -0.0, true]")] == [
        int,
        float,
        float,
        float,
        bool,
    ]
