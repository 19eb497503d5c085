"""The container: the layouts that torch.save writes are read, and every reader reads the same."""

import io
import random
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from niels_gpt.files.container import ContainerError, Member, read_member, read_members
from tests.reliability.campaign import tries
from tests.reliability.hostile import crafted, ending, good, saved

OLD = Path(__file__).with_name("plain-loop-torch-2.6.pt")  # of an older torch than is needed


def contents(data: bytes) -> dict[str, bytes]:
    file, found = io.BytesIO(data), {}
    for name, member in read_members(file).items():
        found[name] = bytearray(member.size)
        read_member(file, name, member, memoryview(found[name]))
    return found


def as_zipfile_reads(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def as_torch_reads(data: bytes) -> dict[str, bytes]:
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))
    return {name: reader.get_record(name) for name in reader.get_all_records()}


@pytest.mark.parametrize(
    "data",
    [
        good(),
        OLD.read_bytes(),
        crafted(),  # as it is built for the hostile files, but without a change
        saved([torch.zeros(0), torch.ones(3), torch.zeros(0, 4)]),
        saved({}),
    ],
    ids=["torch", "torch 2.6", "built here", "empty tensors", "no tensors"],
)
def test_what_torch_writes_is_read_as_by_others(data):
    assert contents(data) == as_zipfile_reads(data) == as_torch_reads(data)


def test_the_archive_is_named_after_its_file(tmp_path):
    path = tmp_path / "my mödel v1.0 (copy).pt"
    torch.save({"x": torch.ones(2)}, path)
    assert contents(path.read_bytes()) == as_torch_reads(path.read_bytes())


def same_to_every_reader(changed: bytes) -> bool:
    """Check that a container is read as by others; return False if it is refused."""
    try:
        mine = contents(changed)
    except ContainerError:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert mine == as_zipfile_reads(changed) == as_torch_reads(changed)
    return True


def places_outside_data(data: bytes) -> list[int]:
    """Return the positions that no CRC guards."""
    members = read_members(io.BytesIO(data)).values()
    guarded = {at for m in members for at in range(m.start, m.start + m.size)}
    return [at for at in range(len(data)) if at not in guarded]


def test_each_byte_changed_gives_a_container_that_is_refused_or_the_same_to_every_reader():
    data, accepted = saved([torch.ones(3)]), 0
    for at in places_outside_data(data):
        for byte in {0, 1, 255, data[at] ^ 16} - {data[at]}:
            accepted += same_to_every_reader(data[:at] + bytes([byte]) + data[at + 1 :])
    assert accepted


@tries(300, 20_000)
def test_a_changed_container_is_refused_or_the_same_to_every_reader(tries):
    """Change some bytes at once."""
    data, chance, accepted = good(), random.Random(0), 0
    places = places_outside_data(data)
    for _ in range(tries):
        copy = bytearray(data)
        for at in chance.sample(places, chance.randrange(1, 4)):
            copy[at] = chance.choice([0, 1, 8, 255, copy[at] ^ 1 << chance.randrange(8)])
        accepted += same_to_every_reader(bytes(copy))
    assert accepted


def test_offsets_and_sizes_of_more_than_32_bits(tmp_path):
    """As torch writes it, seen in a file of 4.7 GB; here the data is a hole."""
    size, crc, path = (1 << 32) + 5, 7, tmp_path / "large.pt"
    big, small = b"large/data/0", b"large/data/1"
    wide = struct.pack("<HHQQ", 1, 16, size, 0)
    header = struct.pack("<4s2xHH4xIIIHH", b"PK\x03\x04", 0x0808, 0, 0, 0, 0, len(big), 24)
    front = header + big + wide + b"FB\0\0"
    at = len(front) + size + 24  # of the second header
    far = struct.pack("<HHQ", 1, 8, at)
    header = struct.pack("<4s2xHH4xIIIHH", b"PK\x03\x04", 0x0808, 0, 0, 0, 0, len(small), 16)
    middle = (
        struct.pack("<4sIQQ", b"PK\x07\x08", crc, size, size) + header + small + far + b"FB\0\0"
    )
    after = b"data" + struct.pack("<4sIQQ", b"PK\x07\x08", crc, 4, 4)
    ones = 2**32 - 1
    entry = struct.Struct("<4s4xHH4xIIIHHH8xI")
    first = entry.pack(b"PK\x01\x02", 0x0808, 0, crc, ones, ones, len(big), 20, 0, 0)
    second = entry.pack(b"PK\x01\x02", 0x0808, 0, crc, 4, 4, len(small), 12, 0, ones)
    directory = first + big + struct.pack("<HHQQ", 1, 16, size, size) + second + small + far
    start = len(front) + size + len(middle) + len(after)
    end = ending(2, len(directory), start, old_start=ones)
    with path.open("wb") as file:
        file.write(front)
        file.seek(size, 1)
        file.write(middle + after + directory + end)
    with path.open("rb") as file:
        members = read_members(file)
    assert members == {
        "data/0": Member(len(front), size, crc),
        "data/1": Member(len(front) + size + len(middle), 4, crc),
    }
