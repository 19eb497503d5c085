"""Load an untrusted `torch.save` file safely.

`torch.load` does not check the CRCs, parses the zip by itself, and lets a small file use a lot of
time and memory (a key that takes forever to hash, a list that contains itself many times over). So
neither it nor `pickle` is used here: the container has one parser (`niels_gpt.files.container`),
and the thirty pickle instructions that torch.save needs are carried out by this module. They can
build plain values and tensors, nothing else. The caller must check the decoded object.
"""

import ctypes
import os
import pickletools
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from niels_gpt.files.container import ContainerError, Member, read_member, read_members

MAX_FILE_BYTES = 16 << 30
MAX_TENSOR_BYTES = MAX_FILE_BYTES - (64 << 20)  # the rest is for the container and the pickle
MAX_PICKLE_BYTES = 16 << 20
MAX_SMALL_BYTES = 1024  # of the members beside the pickle and the storages
MAX_INSTRUCTIONS = 2_000_000  # 1024 blocks take 1.3 million
MAX_TENSORS = 65_000
MAX_DIMS = 16
MAX_KEY_BITS = 31  # of a number as a key: Python hashes larger ones so that all can collide

_DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"


Load = Callable[[BinaryIO, str, Member, torch.dtype], Tensor]


class CheckpointError(ValueError):
    """A checkpoint that is invalid or must not be written; the message says why."""


def read_torch_file(path: Path) -> Any:
    """Decode a file of `torch.save` onto the CPU; nothing in it is executed.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: for everything else.
    """
    with _refusals(), _open_regular(path) as file:
        return _decode_file(file, _load_values)


def check_torch_file(file: BinaryIO) -> None:
    """Raise CheckpointError if `read_torch_file` would refuse this file; tensor values aside."""
    with _refusals():
        _check_size(file.seek(0, os.SEEK_END))
        file.seek(0)
        _decode_file(file, _load_no_values)


def show(text: object) -> str:
    """Return a key as a short piece of printable ASCII."""
    plain = str(text)[:80]
    return plain if plain.isascii() and plain.isprintable() else ascii(plain)


def raw_bytes(t: Tensor) -> memoryview:
    """View the memory of a contiguous CPU tensor; valid as long as the tensor is."""
    if not t.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * t.nbytes).from_address(t.data_ptr())).cast("B")


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn all that decoders raise on damaged files into CheckpointError."""
    try:
        yield
    except (CheckpointError, FileNotFoundError):
        raise
    except ContainerError as error:
        raise CheckpointError(str(error)) from None
    except Exception as error:
        what = show(" ".join(str(error).split()))
        raise CheckpointError(f"cannot be read: {type(error).__name__}: {what}") from None


# --- the file ----------------------------------------------------------------------------------


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
        _check_size(info.st_size)
        yield file


def _check_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise CheckpointError(f"larger than {MAX_FILE_BYTES:,} bytes")


def _decode_file(file: BinaryIO, load: "Load") -> Any:
    """Check the container, then follow the pickle; `load` returns the values of a storage."""
    what = _other_format(file.read(512))
    if what:
        raise CheckpointError(f"not a checkpoint, but {what}")
    members = read_members(file)
    small = {name: m for name, m in members.items() if not name.startswith("data")}
    for name, member in small.items():
        text = _read(file, name, member, MAX_SMALL_BYTES)
        if name == "byteorder" and text != sys.byteorder.encode():
            raise CheckpointError("its numbers have the other byte order")
    if "data.pkl" not in members:
        raise CheckpointError("the zip has no data.pkl")
    data = _read(file, "data.pkl", members["data.pkl"], MAX_PICKLE_BYTES)
    storages = _Storages(file, members, load)
    value = _follow(data, storages.find)
    if unused := members.keys() - small.keys() - storages.found.keys() - {"data.pkl"}:
        raise CheckpointError(f"the zip contains {min(unused)}, which no tensor uses")
    return value


def _read(file: BinaryIO, name: str, member: Member, limit: int) -> bytes:
    if member.size > limit:
        raise CheckpointError(f"{name} is larger than {limit:,} bytes")
    data = bytearray(member.size)
    read_member(file, name, member, memoryview(data))
    return bytes(data)


def _load_values(file: BinaryIO, name: str, member: Member, dtype: torch.dtype) -> Tensor:
    values = torch.empty(member.size // dtype.itemsize, dtype=dtype)
    read_member(file, name, member, raw_bytes(values))
    return values


def _load_no_values(file: BinaryIO, name: str, member: Member, dtype: torch.dtype) -> Tensor:
    return torch.empty(member.size // dtype.itemsize, dtype=dtype, device="meta")


_HEADS = {  # how other files begin
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": (
        "a file in the old format of torch.save; torch.save(torch.load(OLD), NEW) converts it"
    ),
    b"\x80": "a pickle that was not written by torch.save",
    b"version https://git-lfs": "a Git LFS pointer; `git lfs pull` gets the file",
    b"\x1f\x8b": "a file compressed with gzip",
    b"\x28\xb5\x2f\xfd": "a file compressed with zstd",
    b"\xfd7zXZ": "a file compressed with xz",
    b"BZh": "a file compressed with bzip2",
}


def _other_format(head: bytes) -> str:
    """Return what a file is, by its first bytes; "" for a zip."""
    if head.startswith(b"PK\x03\x04"):
        return ""
    if not any(head):
        return "zeros" if head else "an empty file"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return "a safetensors file, which contains only weights"
    if head[257:262] == b"ustar":
        return "a tar file"
    known = (what for start, what in _HEADS.items() if head.startswith(start))
    return next(known, "a text file" if head.isascii() else "a file of another kind")


# --- the pickle --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    values: Tensor  # all of it, in one dimension


class _Storages:
    """The storages of a file, each read when the pickle first names it."""

    def __init__(self, file: BinaryIO, members: Mapping[str, Member], load: Load) -> None:
        self.file, self.members, self.load = file, members, load
        self.found: dict[str, _Storage] = {}

    def find(self, claim: object) -> _Storage:
        """Return the storage that the pickle claims; the location, a device, does not matter."""
        match claim:
            case ("storage", _Global(kind), str(key), str(), int(numel)) if kind in _DTYPES:
                name, dtype = f"data/{key}", _DTYPES[kind]
            case _:
                raise CheckpointError(
                    "data.pkl refers to a storage in a way that torch.save does not"
                )
        member = self.members.get(name)
        if member is None or member.size != numel * dtype.itemsize:
            raise CheckpointError(f"{show(name)} is missing or not of the size in data.pkl")
        if name not in self.found:
            self.found[name] = _Storage(self.load(self.file, name, member, dtype))
        if self.found[name].values.dtype != dtype:
            raise CheckpointError(f"{name} is used with two dtypes")
        return self.found[name]


class _Machine:
    """The stack machine of pickle; each instruction is a function of `_STEPS`."""

    def __init__(self, find: Callable[[object], _Storage]) -> None:
        self.find = find
        self.stack: list[Any] = []
        self.frames: list[list[Any]] = []  # what was on the stack before each mark
        self.memo: dict[int, Any] = {}
        self.tensors = 0

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self, n: int) -> tuple[Any, ...]:
        items = tuple(self.stack[len(self.stack) - n :])
        if len(items) != n:
            raise CheckpointError("data.pkl pops from an empty stack")
        del self.stack[len(self.stack) - n :]
        return items

    def mark(self) -> None:
        self.frames.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> tuple[Any, ...]:
        items = tuple(self.stack)
        self.stack = self.frames.pop()
        return items

    def append(self, items: tuple[Any, ...]) -> None:
        if type(self.stack[-1]) is not list:
            raise CheckpointError("data.pkl appends to something that is not a list")
        self.stack[-1].extend(items)

    def set_items(self, items: tuple[Any, ...]) -> None:
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise CheckpointError("data.pkl sets keys of something that is not a dict")
        if problem := next(filter(None, map(key_problem, items[::2])), None):
            raise CheckpointError(f"data.pkl {problem}")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def name(self, text: str) -> None:
        if text not in (_DICT, _TENSOR, *_DTYPES):
            raise CheckpointError(
                f"data.pkl refers to {show(text)}; a checkpoint has only state_dicts"
                " and plain values"
            )
        self.push(_Global(text))

    def call(self) -> None:
        match self.pop(2):
            case (_Global(name), ()) if name == _DICT:
                self.push({})
            case (_Global(name), tuple(args)) if name == _TENSOR and self.tensors < MAX_TENSORS:
                self.tensors += 1
                self.push(_tensor(args))
            case _:
                raise CheckpointError("data.pkl makes a call that torch.save does not")

    def build(self) -> None:
        """Drop the attributes that state_dict() gives to its OrderedDict."""
        (state,) = self.pop(1)
        if type(state) is not dict or type(self.stack[-1]) is not dict:
            raise CheckpointError("data.pkl modifies an object, which no checkpoint needs")


def key_problem(key: object) -> str | None:
    """Return what is wrong with a key: strings and 31-bit integers are cheap to hash."""
    if type(key) is int and key.bit_length() > MAX_KEY_BITS:
        return f"has a key that is an integer of {key.bit_length()} bits"
    return None if type(key) in (str, int) else f"has a key of type {type(key).__name__}"


def _tensor(args: tuple[Any, ...]) -> Tensor:
    """Return a tensor over a storage, within its bounds."""
    match args:
        case (_Storage(values), int(offset), tuple(size), tuple(stride), bool(grad), dict(hooks)):
            numbers = (offset, *size, *stride)
        case _:
            raise CheckpointError("data.pkl builds a tensor that is not plain data")
    if hooks or len(size) != len(stride) or len(size) > MAX_DIMS:
        raise CheckpointError("data.pkl builds a tensor that is not plain data")
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise CheckpointError("data.pkl builds a tensor of an impossible size")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= values.numel() and all(size):
        raise CheckpointError("data.pkl builds a tensor that exceeds its storage")
    t = torch.empty(0, dtype=values.dtype, device=values.device)
    t.set_(values.untyped_storage(), offset, size, stride)
    return t.requires_grad_(grad)


_PUSH = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, arg: None,
    "STOP": lambda m, arg: None,
    **dict.fromkeys(_PUSH, _Machine.push),
    "NONE": lambda m, arg: m.push(None),
    "NEWTRUE": lambda m, arg: m.push(True),
    "NEWFALSE": lambda m, arg: m.push(False),
    "EMPTY_DICT": lambda m, arg: m.push({}),
    "EMPTY_LIST": lambda m, arg: m.push([]),
    "EMPTY_TUPLE": lambda m, arg: m.push(()),
    "TUPLE1": lambda m, arg: m.push(m.pop(1)),
    "TUPLE2": lambda m, arg: m.push(m.pop(2)),
    "TUPLE3": lambda m, arg: m.push(m.pop(3)),
    "MARK": lambda m, arg: m.mark(),
    "TUPLE": lambda m, arg: m.push(m.pop_to_mark()),
    "APPEND": lambda m, arg: m.append(m.pop(1)),
    "APPENDS": lambda m, arg: m.append(m.pop_to_mark()),
    "SETITEM": lambda m, arg: m.set_items(m.pop(2)),
    "SETITEMS": lambda m, arg: m.set_items(m.pop_to_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, arg: m.memo.update({arg: m.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, arg: m.push(m.memo[arg])),
    "GLOBAL": _Machine.name,
    "BINPERSID": lambda m, arg: m.push(m.find(*m.pop(1))),
    "REDUCE": lambda m, arg: m.call(),
    "BUILD": lambda m, arg: m.build(),
}


def _follow(data: bytes, find: Callable[[object], _Storage]) -> Any:
    """Carry out the instructions of a pickle and return what they make."""
    machine, end = _Machine(find), None
    for count, (opcode, arg, position) in enumerate(pickletools.genops(data)):
        if count >= MAX_INSTRUCTIONS:
            raise CheckpointError(f"data.pkl has more than {MAX_INSTRUCTIONS} instructions")
        if opcode.name not in _STEPS:
            raise CheckpointError(f"data.pkl uses {opcode.name}, which no checkpoint needs")
        _STEPS[opcode.name](machine, arg)
        end = position
    if end != len(data) - 1:
        raise CheckpointError("data.pkl continues after its end")
    (value,) = machine.stack
    return value
