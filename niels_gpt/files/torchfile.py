"""Load an untrusted `torch.save` file safely.

`torch.load` does not check the CRCs of the zip, and `weights_only` unpickling lets a small file
allocate a lot of memory. So the container and the pickle instructions are checked first, within
fixed bounds of time and memory, and only a file that passes is given to torch. The caller must
check the decoded object.
"""

import os
import pickletools
import re
import stat
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

MAX_FILE_BYTES = 16 << 30
MAX_MEMBERS = 65_000
MAX_PICKLE_BYTES = 16 << 20
MAX_INSTRUCTIONS = 2_000_000  # 1024 blocks take 1.3 million

_MEMBER = re.compile(
    r"[^/]+/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id|data/[0-9]+)"
)
_OPCODES = set(
    """PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3""".split()  # noqa: SIM905
)
_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in _STORAGES),
}


class CheckpointError(ValueError):
    """A checkpoint that is invalid or must not be written; the message says why."""


def read_torch_file(path: Path) -> Any:
    """Decode a file of `torch.save` onto the CPU; nothing in it is executed.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: for everything else.
    """
    try:
        with _open_regular(path) as file:
            _check_archive(file)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except (CheckpointError, FileNotFoundError):
        raise
    except Exception as error:  # decoders raise almost anything on damaged files
        text = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())[:100]
        raise CheckpointError(f"cannot be read: {type(error).__name__}: {text}") from None


@contextmanager
def _open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open without waiting for the other end of a pipe; refuse anything but a regular file."""
    if path.is_dir():
        raise CheckpointError("is a folder, not a checkpoint")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file") from None
    with open(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError("not a regular file")
        if info.st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"larger than {MAX_FILE_BYTES} bytes")
        yield file


def _check_archive(file: BinaryIO) -> None:
    """Check the zip: members stored uncompressed, each once, with the right names and CRCs."""
    size = file.seek(0, os.SEEK_END)
    _check_directory_end(file, size)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if len(set(names)) < len(names):
            raise CheckpointError("the zip contains a member twice")
        if len({name.partition("/")[0] for name in names}) != 1:
            raise CheckpointError("the zip was not written by torch.save")
        for member in members:
            if not _MEMBER.fullmatch(member.filename):
                raise CheckpointError(f"the zip has the unknown member {show(member.filename)}")
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise CheckpointError(f"{member.filename} is compressed or encrypted")
            if member.file_size != member.compress_size:
                raise CheckpointError(f"{member.filename} has two sizes")
        if sum(member.file_size for member in members) > size:
            raise CheckpointError("the members are larger than the file")
        pickles = [member for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise CheckpointError("the zip has no data.pkl of a valid size")
        damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{damaged} is damaged: its CRC does not match")
        _check_pickle(archive.read(pickles[0]))


def _check_directory_end(file: BinaryIO, size: int) -> None:
    """Bound the size of the zip directory, which torch writes last, before `zipfile` reads it.

    It ends with a zip64 record of 56 bytes, its locator of 20 and the classic record of 22.
    """
    end = struct.Struct("<4s20xQQQQ 4s16x 4s18x")
    file.seek(max(0, size - end.size))
    tail = file.read(end.size)
    if len(tail) < end.size:
        raise CheckpointError(f"not a checkpoint: {size} bytes")
    zip64, _, members, length, offset, locator, classic = end.unpack(tail)
    if (zip64, locator, classic) != (b"PK\x06\x06", b"PK\x06\x07", b"PK\x05\x06"):
        raise CheckpointError("truncated, or not a torch.save file: no zip directory at its end")
    if members > MAX_MEMBERS or length > 512 * members or offset + length + end.size != size:
        raise CheckpointError("the zip directory is damaged")


def _check_pickle(data: bytes) -> None:
    """Read the instructions without executing them; allow those for plain data and tensors."""
    previous = ""
    for count, (opcode, arg, position) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if name not in _OPCODES:
            raise CheckpointError(f"data.pkl uses {name}, which no checkpoint needs")
        if name == "GLOBAL" and arg not in _GLOBALS:
            raise CheckpointError(f"data.pkl refers to {show(arg)}, which no checkpoint needs")
        if name == "BUILD" and previous not in ("SETITEM", "SETITEMS"):
            raise CheckpointError("data.pkl modifies an object, which no checkpoint needs")
        if count >= MAX_INSTRUCTIONS:
            raise CheckpointError(f"data.pkl has more than {MAX_INSTRUCTIONS} instructions")
        if name == "STOP" and position != len(data) - 1:
            raise CheckpointError("data.pkl continues after its end")
        if name not in ("BINPUT", "LONG_BINPUT"):
            previous = name


def show(text: object) -> str:
    """Return a key as a short piece of printable ASCII."""
    plain = str(text)[:80]
    return plain if plain.isascii() and plain.isprintable() else ascii(plain)
