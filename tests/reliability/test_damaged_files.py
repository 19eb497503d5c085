"""A damaged checkpoint is refused, or is provably the same: never used with other content."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from niels_gpt.checkpoint import load_checkpoint, newest_good
from niels_gpt.config import ModelConfig
from niels_gpt.files.torchfile import CheckpointError
from niels_gpt.schema import content_digest, write_payload
from tests.checkpoints import random_payload
from tests.reliability.campaign import tries

PAGE = 4096
MODEL = ModelConfig(V=64, T=8, C=32, L=1, H=2, d_ff=32)  # 130 kB, most of it tensors


@pytest.fixture(scope="module", params=["own", "plain"])
def save(request) -> Callable[[Path, int], tuple[bytes, str]]:
    """Return what saves a checkpoint and returns its bytes and the digest of its content.

    An own file holds that digest, the file of a plain loop has only its CRCs.
    """

    def save(path, seed):
        payload = random_payload(MODEL, seed=seed)
        if request.param == "own":
            write_payload([path], payload)
        else:
            torch.save(payload, path)
        return path.read_bytes(), content_digest(payload)

    return save


@pytest.fixture(scope="module")
def good(save, tmp_path_factory) -> tuple[bytes, str]:
    """Return the bytes of a good checkpoint and the digest of its content."""
    return save(tmp_path_factory.mktemp("good") / "a.pt", seed=0)


def outcomes(path, damaged, digests, record_property) -> Counter:
    """Load every damaged version; it must be refused or load with unchanged content. Count both."""
    counts = Counter()
    for what, data in damaged:
        path.write_bytes(data)
        try:
            loaded = load_checkpoint(path, device="cpu")
        except CheckpointError:
            counts["refused"] += 1
            continue
        assert content_digest(loaded) in digests, what
        counts["identical"] += 1
    for outcome, count in counts.items():
        record_property(outcome, count)
    print(dict(counts))
    return counts


@tries(200, 10_000)
def test_single_bits(tmp_path, good, record_property, tries):
    data, digest = good
    chance = random.Random(0)

    def flipped():
        for _ in range(tries):
            bit = chance.randrange(len(data) * 8)
            copy = bytearray(data)
            copy[bit // 8] ^= 1 << bit % 8
            yield bit, copy

    counts = outcomes(tmp_path / "a.pt", flipped(), {digest}, record_property)
    assert counts["refused"] > tries * 0.8  # the rest lies in padding that no one reads


@tries(100, 20_000)
def test_truncations(tmp_path, good, record_property, tries):
    data, digest = good
    lengths = range(0, len(data), max(1, len(data) // tries))
    cut = ((length, data[:length]) for length in lengths)
    counts = outcomes(tmp_path / "a.pt", cut, {digest}, record_property)
    assert counts == {"refused": len(lengths)}


@tries(50, 1000)
@pytest.mark.parametrize("size", [512, PAGE])
@pytest.mark.parametrize("fill", [0, 255])
def test_blank_pages(tmp_path, good, record_property, tries, size, fill):
    data, digest = good
    pages = range(0, len(data), size)

    def blanked():
        for start in pages[:: max(1, len(pages) // tries)]:
            copy = bytearray(data)
            stop = min(start + size, len(data))
            copy[start:stop] = bytes([fill]) * (stop - start)
            yield start, copy

    outcomes(tmp_path / "a.pt", blanked(), {digest}, record_property)


@tries(100, 5000)
def test_splices_of_two_checkpoints(tmp_path, save, good, record_property, tries):
    """Bytes of another good checkpoint from some place to another, on a page or anywhere."""
    data, digest = good
    other, other_digest = save(tmp_path / "a.pt", seed=1)
    assert len(other) == len(data)
    chance = random.Random(1)

    def spliced():
        for i in range(tries):
            grain = (1, 512, PAGE)[i % 3]
            start, stop = sorted(chance.randrange(len(data) // grain + 1) * grain for _ in "ab")
            yield (start, stop), data[:start] + other[start:stop] + data[stop:]

    outcomes(tmp_path / "a.pt", spliced(), {digest, other_digest}, record_property)


@tries(50, 2000)
def test_junk_before_after_and_inside(tmp_path, good, record_property, tries):
    data, digest = good
    chance = random.Random(2)

    def grown():
        for i in range(tries):
            place = (0, len(data), chance.randrange(len(data)))[i % 3]
            yield place, data[:place] + chance.randbytes(chance.randrange(1, 200)) + data[place:]

    counts = outcomes(tmp_path / "a.pt", grown(), {digest}, record_property)
    assert counts["refused"] > tries / 2


@tries(5, 60)
def test_resume_latest_passes_over_damage(tmp_path, tries):
    """The newest good one is found whichever files are damaged."""
    chance = random.Random(3)
    names = ["latest.pt", "best.pt", "step_0000001.pt", "step_0000002.pt", "step_0000003.pt"]
    whole = {}
    for step, name in zip((3, 2, 1, 2, 3), names, strict=True):
        write_payload([tmp_path / name], random_payload(step=step))
        whole[name] = (step, (tmp_path / name).read_bytes())
    for _ in range(tries):
        damaged = {name for name in names if chance.random() < 0.6}
        for name, (_, content) in whole.items():
            cut = len(content) if name not in damaged else chance.randrange(len(content))
            (tmp_path / name).write_bytes(content[:cut])
        found, skipped = newest_good(tmp_path)
        left = [whole[name][0] for name in names if name not in damaged]
        assert (found is None) == (not left)
        if found:
            assert found.path.name not in damaged
            assert found.step == max(left)
        assert {path.name for path, _ in skipped} <= damaged
