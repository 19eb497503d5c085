"""Random draws as a function of (seed, purpose, step), so step k is the same in every run."""

import hashlib
import random

import torch


def set_seed(seed: int) -> None:
    """Seed the global generators of torch and `random`, which only plain `nn.Module` use reads."""
    torch.manual_seed(seed)
    random.seed(seed)


def make_generator(seed: int, device: str | torch.device | None = None) -> torch.Generator:
    """Return a new generator on `device` (CPU by default), seeded with `seed`."""
    return torch.Generator(device="cpu" if device is None else device).manual_seed(seed)


def derive_seed(seed: int, purpose: str, step: int) -> int:
    """Return a 63-bit seed for one purpose at one step: BLAKE2b of the three, on any machine.

    Both integers come before the text, so no two keys share an encoding. Distinct keys are
    treated as independent; among n keys, two collide with probability about n**2 / 2**64.
    """
    key = f"{seed:d}/{step:d}/{purpose}".encode()
    digest = hashlib.blake2b(key, digest_size=8, person=b"niels_gpt").digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """Return a CPU generator seeded by (seed, purpose, step).

    Torch's CPU generator keeps 32 bits of a seed, so two of n generators coincide with
    probability about n**2 / 2**33: over 20,000 steps, one run in twenty repeats a draw.
    """
    return make_generator(derive_seed(seed, purpose, step))
