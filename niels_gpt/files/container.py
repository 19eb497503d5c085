"""The zip container of `torch.save`: one parser, for the one layout that torch writes.

A zip states most facts twice, and readers differ in which they believe: the end record or its zip64
counterpart, the offset in the locator or the position of the record, the directory or the header of
each member. So one file can be two archives, one that is checked and another that is loaded. Here
nothing is searched for: from byte 0 on come the header, padding, data and descriptor of each
member, then the directory, then its end, without gaps, and what is stated twice must agree. Every
reader takes such a file for the same archive.

Nothing is compressed and every length is checked against the file, so that time and memory are
proportional to its size. Standard library only.
"""

import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

MAX_MEMBERS = 65_000
MAX_NAME_BYTES = 400
MAX_VERSION = 45  # of the zip format: readers refuse what is too new for them

_END = struct.Struct("<4sQ4sIIQQQQ4sIQI4sHHHHIIH")  # the zip64 record, its locator, the old record
_ENTRY = struct.Struct("<4s2sHHH4sIIIHHHH6sI")
_HEADER = struct.Struct("<4sHHH4sIIIHH")
_NAME = re.compile(
    rb"([^/\x00-\x1f\x7f]+)/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment"
    rb"|\.data/serialization_id|data/[0-9]+)"
)
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED, _HAS_DESCRIPTOR, _UTF8 = 0x0001, 0x0008, 0x0800  # flags
_ZIP64 = 0x0001  # an extra field


class ContainerError(ValueError):
    """A file that is damaged or was not written by torch.save; the message says why."""


class Member(NamedTuple):
    """Where the bytes of a member are, and their CRC."""

    start: int
    size: int
    crc: int


class _Entry(NamedTuple):
    """A directory entry."""

    name: bytes
    flags: int
    method: int
    size: int
    packed_size: int
    crc: int
    offset: int  # of its header
    wide: list[int]  # those of size, packed size and offset that need 64 bits


def read_members(file: BinaryIO) -> dict[str, Member]:
    """Return the members by their names inside the one folder of the archive.

    Raises:
        ContainerError: if the file does not have the layout of torch.save.
    """
    directory, count, stop = _read_directory(file)
    entries = list(_entries(directory, count))
    _check_names(entries)
    starts = [0, *(entry.offset for entry in entries[1:]), stop]
    members = {}
    for entry, start, end in zip(entries, starts[:-1], starts[1:], strict=True):
        if entry.offset != start:
            raise ContainerError("the file does not begin with its first member")
        members[entry.name.partition(b"/")[2].decode("ascii")] = _placed(file, entry, end)
    return members


def read_member(file: BinaryIO, name: str, member: Member, buffer: memoryview) -> None:
    """Read a member into a buffer of its size; ContainerError if the CRC does not match."""
    at = 0
    file.seek(member.start)
    while at < member.size and (n := file.readinto(buffer[at:])):  # type: ignore[attr-defined]
        at += n
    if at < member.size or zlib.crc32(buffer) != member.crc:
        raise ContainerError(f"{name} is damaged: its CRC does not match")


def _read_directory(file: BinaryIO) -> tuple[bytes, int, int]:
    """Return the bytes of the directory, its number of entries and its offset."""
    size = file.seek(0, os.SEEK_END)
    if size < _END.size:
        raise ContainerError(f"truncated to {size} bytes, or not a torch.save file")
    end = _END.unpack(_read(file, size - _END.size, _END.size))
    if (end[0], end[9], end[13]) != (b"PK\x06\x06", b"PK\x06\x07", b"PK\x05\x06"):
        raise ContainerError("truncated, or not a torch.save file: no zip directory at its end")
    versions, (count, length, start) = end[2], end[6:9]
    at = start + length
    record = (b"PK\x06\x06", 44, versions, 0, 0, count, count, length, start)
    locator = (b"PK\x06\x07", 0, at, 1)
    counts = (min(count, _MAX16),) * 2
    old = (b"PK\x05\x06", 0, 0, *counts, min(length, _MAX32), min(start, _MAX32), 0)
    longest = _ENTRY.size + MAX_NAME_BYTES + 28
    if end != (*record, *locator, *old) or at + _END.size != size:
        raise ContainerError("the zip directory is damaged: its end contradicts its position")
    if count > MAX_MEMBERS or length > longest * count:
        raise ContainerError("the zip directory is damaged, or has too many entries")
    return _read(file, start, length), count, start


def _entries(directory: bytes, count: int) -> Iterator[_Entry]:
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > len(directory):
            raise ContainerError("the zip directory is damaged: it ends early")
        fields = _ENTRY.unpack_from(directory, at)
        signature, _, version, flags, method, _, crc, packed_size, size = fields[:9]
        name_length, extra_length, comment_length, disk, attributes, offset = fields[9:]
        fixed = (signature, comment_length, disk, attributes)
        if fixed != (b"PK\x01\x02", 0, 0, bytes(6)) or version > MAX_VERSION:
            raise ContainerError("the zip directory is damaged")
        name_at = at + _ENTRY.size
        extra_at = name_at + name_length
        at = extra_at + extra_length
        wide = _wide_values(directory[extra_at:at], [size, packed_size, offset])
        values = iter(wide)
        size, packed_size, offset = (
            next(values) if value == _MAX32 else value for value in (size, packed_size, offset)
        )
        name = directory[name_at:extra_at]
        yield _Entry(name, flags, method, size, packed_size, crc, offset, wide)
    if at != len(directory):
        raise ContainerError("the zip directory is damaged: it continues after its last entry")


def _wide_values(extra: bytes, values: Sequence[int]) -> list[int]:
    """Return the 64-bit values for those that are all ones; no other extra field is allowed."""
    count = values.count(_MAX32)
    if not count and not extra:
        return []
    form = struct.Struct(f"<HH{count}Q")
    if len(extra) != form.size or form.unpack(extra)[:2] != (_ZIP64, 8 * count) or not count:
        raise ContainerError("the zip directory is damaged: an entry has an unknown extra field")
    return list(form.unpack(extra)[2:])


def _check_names(entries: Sequence[_Entry]) -> None:
    """Check that every entry is uncompressed and has a name that torch.save uses, only once."""
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise ContainerError("the zip contains a member twice")
    if len({name.partition(b"/")[0] for name in names}) != 1:
        raise ContainerError("the zip was not written by torch.save: it has more than one folder")
    for entry in entries:
        if not _NAME.fullmatch(entry.name) or len(entry.name) > MAX_NAME_BYTES:
            raise ContainerError(f"the zip has the unknown member {_shown(entry)}")
        if entry.method or entry.flags & _ENCRYPTED:
            raise ContainerError(f"{_shown(entry)} is compressed or encrypted")
        if entry.size != entry.packed_size:
            raise ContainerError(f"{_shown(entry)} has two sizes")
        if entry.flags != _UTF8 | _HAS_DESCRIPTOR and (entry.flags != _UTF8 or entry.size):
            raise ContainerError(f"{_shown(entry)} is not stored as torch.save does")


def _placed(file: BinaryIO, entry: _Entry, end: int) -> Member:
    """Check the header before a member and the descriptor after it, up to `end`.

    The version and time in the header and the bytes of the padding may be anything.
    """
    length = _HEADER.size + len(entry.name)
    header = _read(file, entry.offset, length).ljust(length, b"\0")
    _, version, _, _, time, *_, extra_length = _HEADER.unpack_from(header)
    extra = _read(file, entry.offset + length, extra_length)
    start = entry.offset + length + extra_length
    fixed = (b"PK\x03\x04", min(version, MAX_VERSION), entry.flags, 0, time, 0, 0, 0)
    front = _HEADER.pack(*fixed, len(entry.name), extra_length)
    descriptor = b""
    if entry.flags & _HAS_DESCRIPTOR:
        form = "<4sIQQ" if entry.wide else "<4sIII"
        descriptor = struct.pack(form, b"PK\x07\x08", entry.crc, entry.size, entry.size)
    at = start + entry.size
    if (
        header != front + entry.name
        or not extra.startswith(_padding(entry, extra_length))
        or at + len(descriptor) != end
        or _read(file, at, len(descriptor)) != descriptor
    ):
        raise ContainerError(
            f"the zip is damaged, or not written by torch.save, at {_shown(entry)}"
        )
    return Member(start, entry.size, entry.crc)


def _padding(entry: _Entry, length: int) -> bytes:
    """Return how the extra field of a header begins: 64-bit values, then padding."""
    wide = [entry.size, 0, *entry.wide[2:]] if len(entry.wide) > 1 else entry.wide
    front = struct.pack(f"<HH{len(wide)}Q", _ZIP64, 8 * len(wide), *wide) if wide else b""
    return front + struct.pack("<2sH", b"FB", max(0, length - len(front) - 4))


def _shown(entry: _Entry) -> str:
    return ascii(entry.name[:80].decode("utf-8", "replace"))


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)
