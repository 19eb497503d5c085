"""Text to byte values and back: the vocabulary is the 256 bytes of UTF-8."""

import torch
from torch import Tensor


def encode(text: str) -> Tensor:
    """Return the UTF-8 bytes of `text` as a 1-D int64 CPU tensor.

    Raises:
        UnicodeEncodeError: (a ValueError) for lone surrogates, which UTF-8 cannot encode.
    """
    data = text.encode("utf-8")
    if not data:
        return torch.empty(0, dtype=torch.int64)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(torch.int64)


def decode(ids: Tensor) -> str:
    """Return the text of a 1-D integer tensor of byte values; invalid UTF-8 becomes U+FFFD.

    Raises:
        ValueError: for another shape or dtype, or a value outside 0 to 255.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 1:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"ids must be a 1-D tensor, got {shape}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    values = ids.tolist()
    try:
        return bytes(values).decode("utf-8", errors="replace")
    except ValueError:
        wrong = next(value for value in values if not 0 <= value <= 255)
        raise ValueError(f"ids must be byte values 0 to 255, got {wrong}") from None
