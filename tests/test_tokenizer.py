"""Bytes: text survives the round trip, and what is not a sequence of bytes is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.tokenizer import decode, encode

DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]


@given(st.text())
def test_text_survives_the_round_trip(text):
    ids = encode(text)
    assert decode(ids) == text
    assert bytes(ids.tolist()) == text.encode("utf-8")
    assert (ids.dtype, ids.dim(), ids.device.type) == (torch.int64, 1, "cpu")


@given(st.text(), st.text())
def test_encoding_concatenates(a, b):
    assert torch.equal(torch.cat([encode(a), encode(b)]), encode(a + b))


@given(st.binary(), st.sampled_from(DTYPES))
def test_any_bytes_decode_as_utf8_with_replacement(data, dtype):
    ids = torch.tensor(list(data), dtype=dtype)
    assert decode(ids) == data.decode("utf-8", errors="replace")


def test_known_bytes():
    assert encode("Aé€😀").tolist() == [65, 195, 169, 226, 130, 172, 240, 159, 152, 128]
    assert decode(torch.tensor([240, 159, 152])) == "\ufffd"


def test_a_strided_view_decodes():
    assert decode(encode("a-b-c")[::2]) == "abc"


def test_encoded_text_is_writable_and_its_own():
    ids = encode("abc")
    ids += 1
    assert decode(ids) == "bcd"
    assert decode(encode("abc")) == "abc"


@pytest.mark.parametrize("value", [-1, 256, 2**40, -(2**63)])
def test_values_that_are_no_bytes_are_refused(value):
    with pytest.raises(ValueError, match=f"0 to 255, got {value}$"):
        decode(torch.tensor([65, value, 66]))


@pytest.mark.parametrize("shape", [(), (1, 1), (0, 3), (2, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="1-D tensor, got"):
        decode(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_other_kinds_of_numbers_are_refused(dtype):
    with pytest.raises(ValueError, match="integers, got torch"):
        decode(torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("ids", [[65], "A", b"A", None])
def test_what_is_no_tensor_is_refused(ids):
    with pytest.raises(ValueError, match="1-D tensor, got"):
        decode(ids)


def test_lone_surrogates_have_no_bytes():
    with pytest.raises(ValueError, match="surrogates"):
        encode("a\ud800")
