"""Files of torch.save decode to what torch.load makes of them, and to nothing else."""

import io
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.files import torchfile
from niels_gpt.files.torchfile import (
    CheckpointError,
    check_torch_file,
    key_problem,
    read_torch_file,
)
from niels_gpt.model.gpt import GPT
from tests.checkpoints import TINY, any_finite_bits, json_like
from tests.files.test_container import OLD

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32]
DTYPES += [torch.int16, torch.int8, torch.uint8, torch.bool]


def decoded(tmp_path, value):
    torch.save(value, tmp_path / "a.pt")
    return read_torch_file(tmp_path / "a.pt")


@st.composite
def tensors(draw):
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    bits = any_finite_bits(shape, torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return bits.to(draw(st.sampled_from(DTYPES)))


@given(value=st.recursive(json_like | tensors(), lambda v: st.lists(v, max_size=3) | st.tuples(v)))
def test_plain_values_and_tensors_decode_to_themselves(tmp_path, value):
    found = decoded(tmp_path, value)
    assert pictured(found) == pictured(value)


def pictured(value):
    """Return a value that is equal where types, shapes and bits are."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), value.contiguous().reshape(-1).tolist())
    if isinstance(value, dict):
        return {(type(k), k): pictured(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return (type(value), [pictured(v) for v in value])
    return (type(value), value)


def test_a_state_dict_decodes_to_a_plain_dict_with_the_tied_pair_in_one_storage(tmp_path):
    model = GPT(TINY)
    found = decoded(tmp_path, model.state_dict())
    assert type(found) is dict
    assert list(found) == list(model.state_dict())
    assert all(torch.equal(found[name], t) for name, t in model.state_dict().items())
    assert found["tok_emb.weight"].data_ptr() == found["lm_head.weight"].data_ptr()
    assert type(decoded(tmp_path, OrderedDict(a=1))) is dict


def test_views_decode_to_views_of_one_storage(tmp_path):
    base = torch.arange(12.0)
    found = decoded(tmp_path, [base[2:5], base.view(3, 4).T, base[:1].expand(4)])
    assert [t.tolist() for t in found] == [[2, 3, 4], base.view(3, 4).T.tolist(), [0] * 4]
    assert found[0].untyped_storage().data_ptr() == found[1].untyped_storage().data_ptr()


def test_the_oldest_torch_that_is_supported():
    assert pictured(read_torch_file(OLD)) == pictured(torch.load(OLD))


@pytest.mark.parametrize("limit", ["MAX_FILE_BYTES", "MAX_PICKLE_BYTES", "MAX_INSTRUCTIONS"])
def test_what_would_be_refused_is_known_before_it_is_written(tmp_path, monkeypatch, limit):
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(300), "y": ["text"] * 400}, buffer)
    check_torch_file(buffer)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    read_torch_file(tmp_path / "a.pt")
    monkeypatch.setattr(torchfile, limit, 350)
    messages = []
    for check in (lambda: check_torch_file(buffer), lambda: read_torch_file(tmp_path / "a.pt")):
        with pytest.raises(CheckpointError, match=r"larger than 350|more than 350") as caught:
            check()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("key", ["", "x" * 1000, 0, -1, 2**31 - 1, 1 - 2**31])
def test_keys_that_are_allowed(key):
    assert key_problem(key) is None


@pytest.mark.parametrize("key", [2**31, -(2**31), True, None, 1.0, b"x", (1,)])
def test_keys_that_are_not(key):
    assert key_problem(key).startswith("has a key ")
