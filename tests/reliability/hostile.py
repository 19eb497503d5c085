"""Files made to harm their reader, and a program that tries them under hard limits.

`python -m tests.reliability.hostile FOLDER` loads every file of the folder and prints, a JSON line
each, its name and what came of it. Should one of them run code, that leaves the file `EXECUTED`.
"""

import contextlib
import gzip
import io
import json
import math
import os
import pickle
import resource
import socket
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from niels_gpt.checkpoint import load_checkpoint
from niels_gpt.config import to_dict
from niels_gpt.files.torchfile import CheckpointError
from niels_gpt.schema import content_digest
from tests.checkpoints import TINY, random_payload

MAX_MEMORY = 1 << 30
MAX_SECONDS = 15
CANARY = "EXECUTED"
COMMAND = f"touch {CANARY}"

Record = tuple[str, bytes]


def good(seed: int = 0) -> bytes:
    """Return a good checkpoint as a plain loop writes it, without a digest to hide other checks."""
    return saved(random_payload(seed=seed))


def torch_zip(*records: Record) -> bytes:
    """Write records into a container with torch's own writer."""
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name, data in records:
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return buffer.getvalue()


def pickled(body: bytes, **storages: bytes) -> bytes:
    """Return a container with this pickle and these storages (`_0=...` is member data/0)."""
    records = [(f"data/{name[1:]}", data) for name, data in storages.items()]
    return torch_zip(("data.pkl", b"\x80\x02" + body + b"."), *records)


def laid_out(
    records: list[Record],
    *,
    header: dict[str, Any] | None = None,
    entry: dict[str, Any] | None = None,
    end: dict[str, Any] | None = None,
    of: str = "archive/data/0",
    before: bytes = b"",
    behind: bytes = b"",
    twin: bool = True,
    gap: bytes = b"",
) -> bytes:
    """Lay members out as torch.save does, but for some fields of one header, entry or the end.

    `before` comes in front of that member, `behind` after its data, and without its `twin` the
    descriptor is missing; the `gap` is between the directory and the end.
    """
    out, directory = b"", b""
    for name, data in records:
        mine = name == of
        crc, size = zlib.crc32(data), len(data)
        same = {"name": name.encode(), "flags": 0x0808, "method": 0, "crc": crc, "size": size}
        h = {**same, "crc": 0, "size": 0, "extra": b"FB\x00\x00", **((mine and header) or {})}
        e = {**same, "extra": b"", "note": b"", **((mine and entry) or {})}
        out += before if mine else b""
        e.setdefault("at", len(out))
        sizes = (h["crc"], h["size"], h["size"], len(h["name"]), len(h["extra"]))
        out += struct.pack("<4s2xHH4xIIIHH", b"PK\x03\x04", h["flags"], h["method"], *sizes)
        out += h["name"] + h["extra"] + data + (behind if mine else b"")
        if twin or not mine:
            out += struct.pack("<4sIII", b"PK\x07\x08", crc, size, size)
        sizes = (e["crc"], e["size"], e["size"], len(e["name"]), len(e["extra"]), len(e["note"]))
        directory += struct.pack("<4s4xHH4x", b"PK\x01\x02", e["flags"], e["method"])
        directory += struct.pack("<IIIHHH8xI", *sizes, e["at"])
        directory += e["name"] + e["extra"] + e["note"]
    return out + directory + gap + ending(len(records), len(directory), len(out), **(end or {}))


def ending(count: int, length: int, start: int, /, **changes: Any) -> bytes:
    """Return a zip64 record, its locator and the old end record, with some fields changed."""
    f: dict[str, Any] = {"count": count, "length": length, "start": start, "at": start + length}
    f |= {"old_count": count, "old_length": length, "old_start": start, "disk": 0, "disks": 1}
    f |= {"here": count, "own": 44, "note": b"", **changes}
    record = struct.pack("<4sQ4xIIQQ", b"PK\x06\x06", f["own"], f["disk"], 0, f["here"], f["count"])
    record += struct.pack("<QQ", f["length"], f["start"])
    record += struct.pack("<4sIQI", b"PK\x06\x07", 0, f["at"], f["disks"])
    record += struct.pack("<4sHHHH", b"PK\x05\x06", 0, 0, f["old_count"], f["old_count"])
    return record + struct.pack("<IIH", f["old_length"], f["old_start"], len(f["note"])) + f["note"]


def two_archives(shown: bytes, hidden: bytes) -> bytes:
    """Return a file whose end is that of `shown`, but for a locator that leads to `hidden`.

    Python's zipfile does not follow the locator, torch does.
    """
    start, length, _ = _directory_of(hidden)
    hidden_end = len(hidden) - 98
    front = hidden[: hidden_end + 56]
    assert start + length == hidden_end
    body = shown[: _directory_of(shown)[0]]
    directory = bytearray(shown[len(body) : len(shown) - 98])
    at = 0
    while at < len(directory):  # move the members of `shown` behind those of `hidden`
        name, extra = struct.unpack_from("<HH", directory, at + 28)
        (offset,) = struct.unpack_from("<I", directory, at + 42)
        struct.pack_into("<I", directory, at + 42, offset + len(front))
        at += 46 + name + extra
    start, count = len(front) + len(body), _directory_of(shown)[2]
    end = ending(count, len(directory), start, at=hidden_end)
    return front + body + bytes(directory) + end


def _directory_of(data: bytes) -> tuple[int, int, int]:
    """Return where the directory begins, its length and its number of entries."""
    count, length, start = struct.unpack_from("<QQQ", data, len(data) - 98 + 32)
    return start, length, count


def members_of(data: bytes) -> list[Record]:
    """Return the members of a container, in order."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def reduce_to(module: str, name: str, *args: str) -> bytes:
    """Pickle a call of a global, in the opcodes that torch.save uses."""
    texts = b"".join(text(arg) for arg in args)
    return f"c{module}\n{name}\n".encode() + b"(" + texts + b"tR"


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def tensor(
    *,
    key: str = "0",
    numel: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int = 0,
    kind: str = "Float",
    grad: bytes = b"\x89",
    hooks: bytes = b"ccollections\nOrderedDict\n)R",
    more: bytes = b"",
) -> bytes:
    """Pickle a tensor over storage `key`, with any claims."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + text("cpu")
    storage += number(numel) + b"tQ"
    dims = b"".join(b"(" + b"".join(map(number, dim)) + b"t" for dim in (size, stride))
    args = b"(" + storage + number(offset) + dims + grad + hooks + more + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + args + b"R"


def swapped(**tensors: bytes) -> bytes:
    """Return a good checkpoint but for some tensors of its model, each in a storage of its own.

    `ln_f__bias=...` stands for "ln_f.bias"; their storages hold 64 bytes, as member data/9xx.
    """
    payload = random_payload()
    for place, name in enumerate(tensors):
        payload["model_state"][name.replace("__", ".")] = f"PLACE{place}"
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    records = members_of(buffer.getvalue())
    prefix = records[0][0].partition("/")[0]
    body = dict(records)[f"{prefix}/data.pkl"]
    for place, code in enumerate(tensors.values()):
        at = body.index(text(f"PLACE{place}"))
        stop = at + len(text(f"PLACE{place}"))
        body = body[:at] + code + body[stop:]
    storages = [(n.rpartition("/")[2], data) for n, data in records if "/data/" in n]
    storages += [("900", bytes(64)), ("901", bytes(64))]
    named = [(f"data/{key}", data) for key, data in storages if text(key) in body]
    return torch_zip(("data.pkl", body), *named)


def stepping(body: bytes) -> bytes:
    """Pickle a dict with the keys of a checkpoint and this as the step."""
    others = b"".join(text(key) + b"}" for key in ("model_cfg", "train_cfg", "model_state"))
    return b"}(" + others + text("step") + body + b"u"


def nested_lists(depth: int) -> bytes:
    """Ten times one list that holds ten times one list, ...: small in memory, endless to walk."""
    body = b"(]q\x00"
    for level in range(depth):
        body += b"](" + bytes([*b"h", level]) * 10 + b"eq" + bytes([level + 1])
    return stepping(body + b"t")


def many_blocks(blocks: int) -> bytes:
    payload = random_payload()
    payload["model_cfg"] = {**to_dict(TINY), "L": blocks}
    payload["model_state"] = {str(i): torch.zeros(1) for i in range(blocks)}
    return saved(payload)


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def edited(name: str, data: bytes) -> bytes:
    """Return the good checkpoint with one member replaced, written by torch's writer."""
    records = [(n.partition("/")[2], d) for n, d in members_of(good())]
    automatic = ("version", ".data/serialization_id", "byteorder")
    return torch_zip(*((n, data if n == name else d) for n, d in records if n not in automatic))


def legacy_tar() -> bytes:
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("pickle")
        body = pickle.dumps({"x": 1})
        info.size = len(body)
        archive.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


COLLIDING = range(1, 150_000)
DIRECTORY = "zip directory is damaged"
FRAMED = "the zip is damaged, or not written by torch.save, at 'archive/data/0'"
FRAMED_BEFORE = "the zip is damaged, or not written by torch.save, at 'archive/"
ORDERED = b"ccollections\nOrderedDict\n"
FLAT = {"numel": 4, "size": (4,), "stride": (1,)}

# name -> (bytes, pattern of the refusal)
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    # pickles that call something
    "os.system": (lambda: pickled(reduce_to("os", "system", COMMAND)), "refers to os system"),
    "posix.system": (lambda: pickled(reduce_to("posix", "system", COMMAND)), "refers to posix"),
    "eval": (
        lambda: pickled(reduce_to("builtins", "eval", f"__import__('os').system({COMMAND!r})")),
        "refers to builtins eval",
    ),
    "exec": (lambda: pickled(reduce_to("builtins", "exec", f"open({CANARY!r},'w')")), "exec"),
    "getattr chain": (
        lambda: pickled(b"cbuiltins\ngetattr\n(" + b"cos\nsys\n" + text("modules") + b"tR"),
        "refers to builtins getattr",
    ),
    "subprocess": (lambda: pickled(reduce_to("subprocess", "getoutput", COMMAND)), "subprocess"),
    "runpy": (lambda: pickled(reduce_to("runpy", "run_path", "x.py")), "refers to runpy"),
    "torch.load": (lambda: pickled(reduce_to("torch", "load", "x.pt")), "refers to torch load"),
    "torch.hub": (lambda: pickled(reduce_to("torch.hub", "load", "x")), "refers to torch.hub"),
    "a dotted global": (
        lambda: pickled(reduce_to("collections", "OrderedDict.fromkeys", "x")),
        "refers to collections OrderedDict.fromkeys",
    ),
    "STACK_GLOBAL": (
        lambda: torch_zip(("data.pkl", b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x05touch\x85R.")),
        "uses SHORT_BINUNICODE",
    ),
    "INST": (lambda: pickled(b"(" + text(COMMAND) + b"ios\nsystem\n"), "uses INST"),
    "OBJ": (lambda: pickled(b"(cos\nsystem\n" + text(COMMAND) + b"o"), "refers to os system"),
    "NEWOBJ": (lambda: pickled(ORDERED + b")\x81"), "uses NEWOBJ"),
    "EXT1": (lambda: pickled(b"\x82\x01"), "uses EXT1"),
    "PERSID": (lambda: pickled(b"P0\n"), "uses PERSID"),
    "BUILD of a class": (
        lambda: pickled(ORDERED + b"(" + text("clear") + b"t" + b"b"),
        "modifies an object",
    ),
    "BUILD of a tensor": (
        lambda: pickled(tensor(**FLAT) + b"(K\x01tb", _0=bytes(16)),
        "modifies an object",
    ),
    "bytearray of 10^12": (
        lambda: pickled(b"cbuiltins\nbytearray\n(" + number(10**12) + b"tR"),
        "refers to builtins bytearray",
    ),
    "codecs": (lambda: pickled(reduce_to("_codecs", "encode", "x", "rot13")), "refers to _codecs"),
    "numpy": (
        lambda: pickled(reduce_to("numpy.core.multiarray", "_reconstruct", "x")),
        "refers to numpy",
    ),
    "a parameter": (
        lambda: pickled(reduce_to("torch._utils", "_rebuild_parameter", "x")),
        "_rebuild_parameter",
    ),
    "a tensor subclass": (
        lambda: pickled(reduce_to("torch._tensor", "_rebuild_from_type_v2", "x")),
        "_rebuild_from_type_v2",
    ),
    "a whole module": (lambda: saved(torch.nn.Linear(1, 1)), "refers to torch.nn.modules.linear"),
    # pickles that ask for much
    "lists of lists": (lambda: pickled(nested_lists(40)), "more than|deeper than"),
    "lists of lists, shallow": (lambda: pickled(nested_lists(20)), "more than 200000 values"),
    "a list in itself": (
        lambda: pickled(stepping(b"]q\x00h\x00a")),
        "deeper than",
    ),
    "deep nesting": (
        lambda: pickled(stepping(b"]" * 100_000 + b"a" * 99_999)),
        "deeper than",
    ),
    "two million instructions": (
        lambda: pickled(b"}" + text("x") + b"](" + b"N" * 2_100_000 + b"es"),
        "more than 2000000 instructions",
    ),
    "a pickle of 20 MB": (lambda: pickled(text("x" * 20_000_000)), "data.pkl is larger than"),
    "memo index 2^32": (lambda: pickled(b"}r\xff\xff\xff\xff"), "lacks the keys"),
    "a text of 4 GB, claimed": (lambda: pickled(b"X\xff\xff\xff\xffab"), "cannot be read"),
    "LONG4 of 2 GB, claimed": (lambda: pickled(b"\x8b\xff\xff\xff\x7fab"), "cannot be read|LONG4"),
    "LONG in decimal digits": (lambda: pickled(b"L" + b"9" * 100_000 + b"L\n"), "cannot be|LONG"),
    "code after the end": (
        lambda: pickled(b"}." + reduce_to("os", "system", COMMAND)),
        "continues after its end",
    ),
    "no end": (lambda: torch_zip(("data.pkl", b"\x80\x02}")), "cannot be read"),
    "an empty pickle": (lambda: torch_zip(("data.pkl", b"\x80\x02.")), "cannot be read"),
    "a key with a lone surrogate": (lambda: pickled(b"}" + text("\udc80") + b"Ns"), "lacks"),
    "a list as a key": (lambda: pickled(b"}]Ns"), "has a key of type list"),
    "a tuple as a key": (lambda: pickled(b"})Ns"), "has a key of type tuple"),
    "a key that takes for ever to hash": (
        lambda: pickled(b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"}h\x3bNs"),
        "has a key of type tuple",
    ),
    "numbers as keys that collide": (
        lambda: pickled(b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in COLLIDING) + b"u"),
        "has a key that is an integer of 6[12] bits",
    ),
    "numbers of parameters that collide": (
        lambda: with_parameters([i * (2**61 - 1) for i in COLLIDING]),
        "lists no parameters",
    ),
    "an OrderedDict of nonsense": (
        lambda: pickled(ORDERED + b"(K\x05tR"),
        "makes a call that torch.save does not",
    ),
    "a call of text": (lambda: pickled(text("x") + b")R"), "makes a call"),
    "a stack that is empty": (lambda: pickled(b"\x85"), "pops from an empty stack"),
    "keys of a list": (
        lambda: pickled(b"]" + text("x") + b"Ns"),
        "sets keys of something that is not a dict",
    ),
    "an item of a dict": (lambda: pickled(b"}Na"), "appends to something that is not a list"),
    "660,000 tensors": (lambda: many_tensors(660_000), "makes a call"),
    "98,000 parameters": (lambda: with_parameters([*range(98_000)]), "match its digest"),
    "long names above many tensors": (lambda: long_names(50_000), "match its digest"),
    "a long name above many values": (lambda: long_name(8_000_000), "match its digest"),
    "a loss of 2000 bits": (lambda: saved({**random_payload(), "best_val_loss": 2**1990}), "bits"),
    "an optimizer's step of 2000 bits": (
        lambda: undigested(
            optimizer_state={"state": {0: {"step": 2**1990}}, "param_groups": [{"params": [0]}]}
        ),
        "bits",
    ),
    # tensors
    "stride 0, 10^12 elements": (
        lambda: swapped(ln_f__bias=tensor(key="900", numel=16, size=(10**12,), stride=(0,))),
        "does not fill its storage",
    ),
    "stride 0, the right shape": (
        lambda: swapped(ln_f__bias=tensor(key="900", numel=16, size=(4,), stride=(0,))),
        "does not fill its storage",
    ),
    "a storage larger than its record": (
        lambda: swapped(ln_f__bias=tensor(key="900", numel=10**6, size=(4,), stride=(1,))),
        "data/900 is missing or not of the size",
    ),
    "a storage of 10^15": (
        lambda: swapped(ln_f__bias=tensor(key="900", numel=10**15, size=(4,), stride=(1,))),
        "data/900 is missing or not of the size",
    ),
    "a storage of negative size": (
        lambda: swapped(ln_f__bias=tensor(key="900", numel=-1, size=(4,), stride=(1,))),
        "data/900 is missing or not of the size",
    ),
    "a view into a storage": (
        lambda: swapped(ln_f__bias=tensor(key="900", numel=16, size=(4,), stride=(1,), offset=2)),
        "does not fill its storage",
    ),
    "beyond the storage": (
        lambda: swapped(ln_f__bias=tensor(key="900", numel=16, size=(4,), stride=(1,), offset=99)),
        "exceeds its storage",
    ),
    "larger than the storage": (
        lambda: swapped(ln_f__bias=tensor(key="900", numel=16, size=(10**9,), stride=(1,))),
        "exceeds its storage",
    ),
    "a negative stride": (
        lambda: swapped(ln_f__bias=tensor(key="900", numel=16, size=(4,), stride=(-1,), offset=4)),
        "of an impossible size",
    ),
    "sizes that overflow": (
        lambda: swapped(ln_f__bias=tensor(key="900", numel=16, size=(2**62, 4), stride=(0, 0))),
        "does not fill|cannot be read",
    ),
    "a storage shared by two": (
        lambda: swapped(
            ln_f__bias=tensor(key="900", kind="Byte", numel=64, size=(64,), stride=(1,)),
            ln_f__weight=tensor(key="900", kind="Byte", numel=64, size=(64,), stride=(1,)),
        ),
        "shares the storage of",
    ),
    "a storage of a missing record": (
        lambda: swapped(ln_f__bias=tensor(key="77777", numel=4, size=(4,), stride=(1,))),
        "data/77777 is missing",
    ),
    "a storage of another folder": (
        lambda: swapped(ln_f__bias=tensor(key="../../etc/passwd", numel=4, size=(4,), stride=(1,))),
        "etc/passwd is missing",
    ),
    "another dtype": (
        lambda: swapped(ln_f__bias=tensor(key="900", kind="Long", numel=8, size=(8,), stride=(1,))),
        "is torch.int64",
    ),
    "a complex dtype": (
        lambda: swapped(
            ln_f__bias=tensor(key="900", kind="ComplexFloat", numel=8, size=(8,), stride=(1,))
        ),
        "refers to torch ComplexFloatStorage",
    ),
    "a quantized dtype": (
        lambda: swapped(
            ln_f__bias=tensor(key="900", kind="QInt8", numel=64, size=(64,), stride=(1,))
        ),
        "refers to torch QInt8Storage",
    ),
    "a tensor that wants gradients": (
        lambda: swapped(
            ln_f__bias=tensor(key="900", numel=16, size=(16,), stride=(1,), grad=b"\x88")
        ),
        "is not plain data",
    ),
    "a negated view": (
        lambda: swapped(
            ln_f__bias=tensor(
                key="900", numel=16, size=(16,), stride=(1,), more=b"}" + text("neg") + b"\x88s"
            )
        ),
        "is not plain data",
    ),
    "a storage of two dtypes": (
        lambda: swapped(
            ln_f__bias=tensor(key="900", numel=16, size=(16,), stride=(1,)),
            ln_f__weight=tensor(key="900", kind="Int", numel=16, size=(16,), stride=(1,)),
        ),
        "is used with two dtypes",
    ),
    "a storage of no tensor": (
        lambda: torch_zip(("data.pkl", b"\x80\x02}."), ("data/0", bytes(16))),
        "data/0, which no tensor uses",
    ),
    "a hundred thousand dimensions": (
        lambda: swapped(
            ln_f__bias=tensor(key="900", numel=16, size=(1,) * 10**5, stride=(0,) * 10**5)
        ),
        "not plain data",
    ),
    "a storage that is a tuple": (lambda: pickled(b")Q"), "refers to a storage in a way"),
    "a storage on its own": (
        lambda: pickled(
            stepping(
                b"("
                + text("storage")
                + b"ctorch\nFloatStorage\n"
                + text("0")
                + text("cpu")
                + b"K\x04tQ"
            ),
            _0=bytes(16),
        ),
        "step is a ",
    ),
    # configs
    "1000 blocks": (lambda: many_blocks(1000), "model_state (lacks|has the unknown)"),
    "a billion blocks": (
        lambda: saved({**random_payload(), "model_cfg": {**to_dict(TINY), "L": 10**9}}),
        "L=1000000000",
    ),
    "a huge width": (
        lambda: saved({**random_payload(), "model_cfg": {**to_dict(TINY), "C": 65536, "V": 65536}}),
        r"has shape \(16, 4\), but the config requires \(65536, 65536\)",
    ),
    "a wrong digest": (
        lambda: saved({**random_payload(), "digest": content_digest(random_payload(seed=1))}),
        "does not match its digest",
    ),
    # containers
    "a zip bomb": (
        lambda: laid_out(
            [("a/data.pkl", b"\x80\x02}."), ("a/data/0", zlib.compress(bytes(20_000_000)))],
            of="a/data/0",
            header={"method": 8},
            entry={"method": 8},
        ),
        "is compressed",
    ),
    "overlapping members": (lambda: overlapping(1000), "not written by torch.save, at 'a/data/0'"),
    "a locator of another archive": (lambda: two_archives(good(), good(1)), DIRECTORY),
    "a locator of an archive that takes for ever": (
        lambda: two_archives(good(), FILES["a key that takes for ever to hash"][0]()),
        DIRECTORY,
    ),
    "a locator of nowhere": (lambda: crafted(end={"at": 2**40}), DIRECTORY),
    "a gap before the end": (lambda: crafted(gap=bytes(64)), DIRECTORY),
    "two disks": (lambda: crafted(end={"disks": 2}), DIRECTORY),
    "another disk": (lambda: crafted(end={"disk": 1}), DIRECTORY),
    "fewer members on this disk": (lambda: crafted(end={"here": 3}), DIRECTORY),
    "a longer end record": (lambda: crafted(end={"own": 200}), DIRECTORY),
    "a comment": (lambda: crafted(end={"note": b"hello"}), "no zip directory at its end"),
    "a comment that ends like a zip": (
        lambda: crafted(end={"note": ending(54, 3000, 100)}),
        DIRECTORY,
    ),
    "the old end record with fewer members": (lambda: crafted(end={"old_count": 3}), DIRECTORY),
    "the old end record of another place": (lambda: crafted(end={"old_start": 64}), DIRECTORY),
    "the old end record of another length": (lambda: crafted(end={"old_length": 64}), DIRECTORY),
    "fewer members than entries": (
        lambda: crafted(end={"count": 3, "here": 3, "old_count": 3}),
        "continues after its last entry|too many entries",
    ),
    "more members than entries": (
        lambda: crafted(end={"count": 99, "here": 99, "old_count": 99}),
        "it ends early",
    ),
    "bytes in front": (
        lambda: crafted(of="archive/data.pkl", before=bytes(64)),
        "not a checkpoint, but a file of another kind",
    ),
    "an archive in front": (
        lambda: crafted(of="archive/data.pkl", before=good()),
        "does not begin with its first member",
    ),
    "bytes between members": (lambda: crafted(before=bytes(64)), FRAMED_BEFORE),
    "bytes behind a member": (lambda: crafted(behind=bytes(64)), FRAMED),
    "no descriptor": (lambda: crafted(twin=False), FRAMED),
    "a descriptor of another CRC": (lambda: with_other_descriptor(good()), FRAMED),
    "a header of another name": (lambda: crafted(header={"name": b"archive/data/1"}), FRAMED),
    "a header of another size": (lambda: crafted(header={"size": 12}), FRAMED),
    "a header of another CRC": (lambda: crafted(header={"crc": 12}), FRAMED),
    "a header of another method": (lambda: crafted(header={"method": 8}), FRAMED),
    "a header of other flags": (lambda: crafted(header={"flags": 0x0008}), FRAMED),
    "a header with another name inside": (
        lambda: crafted(header={"extra": unicode_name("archive/data/0", "archive/data/1")}),
        FRAMED,
    ),
    "a header whose padding leaps": (lambda: crafted(header={"extra": b"FB\xff\x00"}), FRAMED),
    "a header with a size inside": (
        lambda: crafted(header={"extra": struct.pack("<HHQQ", 1, 16, 8, 8) + b"FB\x00\x00"}),
        FRAMED,
    ),
    "an entry of other flags": (
        lambda: crafted(entry={"flags": 0x0800}),
        "is not stored as torch.save does",
    ),
    "an entry of another place": (lambda: crafted(entry={"at": 0}), FRAMED_BEFORE),
    "an entry beyond the end": (lambda: crafted(entry={"at": 2**31}), FRAMED_BEFORE),
    "an entry of a smaller size": (lambda: crafted(entry={"size": 8}), FRAMED),
    "an entry of a larger size": (lambda: crafted(entry={"size": 2**31}), FRAMED),
    "an entry with another name inside": (
        lambda: crafted(entry={"extra": unicode_name("archive/data/0", "archive/data/1")}),
        "unknown extra field",
    ),
    "an entry with a size inside": (
        lambda: crafted(entry={"extra": struct.pack("<HHQ", 1, 8, 8)}),
        "unknown extra field",
    ),
    "an entry with 64-bit values": (
        lambda: crafted(entry={"size": 2**32 - 1, "extra": struct.pack("<HHQQ", 1, 16, 256, 256)}),
        FRAMED,
    ),
    "an entry with a comment": (lambda: crafted(entry={"note": b"x"}), "directory is damaged"),
    "a name in capitals": (
        lambda: laid_out([*members_of(good()), ("archive/DATA.PKL", b"\x80\x02}.")]),
        "unknown member",
    ),
    "a name with a NUL": (
        lambda: laid_out([*members_of(good()), ("archive/data.pkl\0", b"\x80\x02}.")]),
        "unknown member",
    ),
    "a name that commands the terminal": (
        lambda: laid_out([("a\x1b]0;owned\x07/data.pkl", b"\x80\x02}.")]),
        "unknown member",
    ),
    "a folder in capitals": (
        lambda: laid_out([*members_of(good()), ("ARCHIVE/data.pkl", b"\x80\x02}.")]),
        "more than one folder",
    ),
    "a member twice": (
        lambda: laid_out([*members_of(good()), ("archive/data.pkl", b"\x80\x02}.")]),
        "contains a member twice",
    ),
    "two folders": (
        lambda: laid_out([*members_of(good()), ("other/data.pkl", b"\x80\x02}.")]),
        "not written by torch.save",
    ),
    "a TorchScript archive": (
        lambda: torch_zip(
            ("data.pkl", b"\x80\x02}."), ("constants.pkl", b"\x80\x02)."), ("code/m.py", b"pass")
        ),
        "unknown member",
    ),
    "a path out of the zip": (
        lambda: laid_out([*members_of(good()), ("archive/../../etc/cron", b"x")]),
        "unknown member",
    ),
    "no pickle": (lambda: torch_zip(("data/0", bytes(16))), "no data.pkl"),
    "an encrypted member": (lambda: flagged(good(), 1), "compressed or encrypted"),
    "a wrong CRC": (lambda: with_wrong_crc(good()), "not written by torch.save, at"),
    "a wrong value": (lambda: with_wrong_value(good()), "data.pkl is damaged: its CRC does not"),
    "a directory of 2^60 members": (
        lambda: crafted(end={"count": 2**60, "here": 2**60}),
        "zip directory is damaged",
    ),
    "a directory of 2^60 bytes": (
        lambda: crafted(end={"length": 2**60}),
        "zip directory is damaged",
    ),
    "66,000 members": (
        lambda: crafted(end={"count": 66_000, "here": 66_000}),
        "zip directory is damaged",
    ),
    "big-endian numbers": (lambda: edited_byteorder(), "have the other byte order"),
    "the old format of torch": (
        lambda: saved(random_payload(), _use_new_zipfile_serialization=False),
        "the old format of torch.save; torch.save.* converts it",
    ),
    "the tar format of torch": (legacy_tar, "a tar file"),
    "a plain pickle": (
        lambda: pickle.dumps({"step": 1}),
        "a pickle that was not written by torch.save",
    ),
    "a safetensors file": (
        lambda: struct.pack("<Q", 64) + b'{"x":{"dtype":"F32"'.ljust(64) + bytes(16),
        "a safetensors file",
    ),
    "a pointer of Git LFS": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a Git LFS pointer; `git lfs pull`",
    ),
    "a compressed file": (lambda: gzip.compress(good()), "compressed with gzip"),
    "an empty file": (lambda: b"", "not a checkpoint, but an empty file"),
    "zeros": (lambda: bytes(100_000), "not a checkpoint, but zeros"),
    "text": (lambda: b'{"model": {}}\n' * 100, "not a checkpoint, but a text file"),
    "text that begins like a zip": (
        lambda: b"PK\x03\x04 the quick brown fox\n" * 100,
        "not a torch.save file",
    ),
    "an end alone": (lambda: ending(0, 0, 0), "a file of another kind|a text file"),
    "a beginning alone": (lambda: good()[:60], "truncated to 60 bytes"),
    "an ordinary zip": (lambda: ordinary_zip(), "no zip directory at its end"),
}


def ordinary_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members_of(good()):
            archive.writestr(name, data)
    return buffer.getvalue()


def overlapping(copies: int) -> bytes:
    """Let many entries of the directory stand for the one member."""
    data = laid_out([("a/data.pkl", b"\x80\x02}."), ("a/data/0", bytes(1_000_000))])
    start, length, count = _directory_of(data)
    entries = [data[start : start + length]]
    for i in range(1, copies):
        name = f"a/data/{i}".encode()
        entry = bytearray(entries[0][-46 - len("a/data/0") :])
        struct.pack_into("<H", entry, 28, len(name))
        entries.append(bytes(entry[:46]) + name)
    directory = b"".join(entries)
    return data[:start] + directory + ending(count + copies - 1, len(directory), start)


def flagged(data: bytes, flag: int) -> bytes:
    """Set a flag bit in the directory entry of the first member."""
    copy = bytearray(data)
    copy[copy.index(b"PK\x01\x02") + 8] |= flag
    return bytes(copy)


def with_wrong_crc(data: bytes) -> bytes:
    copy = bytearray(data)
    copy[copy.index(b"PK\x01\x02") + 16] ^= 1
    return bytes(copy)


def with_other_descriptor(data: bytes) -> bytes:
    """Change the CRC behind the data of the one that `FRAMED` names."""
    copy = bytearray(data)
    at = copy.index(b"archive/data/0")
    copy[copy.index(b"PK\x07\x08", at) + 4] ^= 1
    return bytes(copy)


def with_wrong_value(data: bytes) -> bytes:
    copy = bytearray(data)
    copy[copy.index(b"train_cfg")] ^= 1
    return bytes(copy)


def edited_byteorder() -> bytes:
    return laid_out([(n, b"big" if n.endswith("byteorder") else d) for n, d in members_of(good())])


def crafted(**changes: Any) -> bytes:
    """Return the good checkpoint in a container with some changes of `laid_out`."""
    return laid_out(members_of(good()), **changes)


def unicode_name(old: str, new: str) -> bytes:
    """Return the extra field that gives a member another name (Info-ZIP's "Unicode Path")."""
    body = struct.pack("<BI", 1, zlib.crc32(old.encode())) + new.encode()
    return struct.pack("<HH", 0x7075, len(body)) + body


def undigested(**changes: Any) -> bytes:
    """Return a checkpoint that is good but for its digest, which is compared last of all."""
    return saved({**random_payload(), "digest": "0" * 64, **changes})


def with_parameters(numbers: list[int]) -> bytes:
    """Return a checkpoint whose optimizer numbers its parameters so, with an entry for each."""
    entries: dict[int, Any] = {i: {} for i in numbers if i < 2**31}
    return undigested(optimizer_state={"state": entries, "param_groups": [{"params": numbers}]})


def many_tensors(count: int) -> bytes:
    """Return a list of small tensors, each made by three instructions."""
    body = tensor(**FLAT)
    function, args = body[: body.index(b"(")], body[body.index(b"(") : -1]
    again = b"h\x00h\x01R" * count
    return pickled(b"](" + function + b"q\x00" + args + b"q\x01R" + again + b"e", _0=bytes(16))


def long_names(count: int) -> bytes:
    """Return a checkpoint of many tensors whose names are as long as names can be."""
    tree: Any = [torch.zeros(1, dtype=torch.uint8) for _ in range(count)]
    for _ in range(29):
        tree = {"\U0001f600" * 80: tree}
    return undigested(more=tree)


def long_name(length: int) -> bytes:
    """Return a checkpoint with a long name above many values."""
    more = {"x" * length: dict.fromkeys(range(100_000), 0)}
    return undigested(optimizer_state={"state": {}, "param_groups": [], **more})


# name -> (what makes the entry at the path, pattern of the refusal)
NODES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "a pipe that no one writes": (lambda path: os.mkfifo(path), "not a regular file"),
    "a link to endless zeros": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "cannot be read"),
    "a socket": (lambda path: _socket(path), "cannot be read|not a regular file"),
    "a terabyte of nothing": (lambda path: _sparse(path, 1 << 40), "larger than"),
    "ten gigabytes of nothing": (lambda path: _sparse(path, 10 << 30), "but zeros"),
}


def _socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path.name)  # a longer name may be too long for a socket


def _sparse(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


PATTERNS = {name: pattern for name, (_, pattern) in [*FILES.items(), *NODES.items()]}


def build(folder: Path, name: str) -> None:
    """Make one of the files in the folder."""
    path = folder / f"{name}.pt"
    if name in FILES:
        path.write_bytes(FILES[name][0]())
    else:
        NODES[name][0](path)


def main(folder: Path) -> None:
    """Load each file under limits of memory and, each for itself, of processor time.

    Prints a line for each: its name, the outcome, the message, and the processor seconds.
    """
    if sys.platform == "linux":  # macOS does not enforce a limit of memory
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + MAX_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    os.chdir(folder)
    for path in sorted(folder.glob("*.pt")):
        began = time.process_time()
        limit = math.ceil(began) + MAX_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            load_checkpoint(path, device="cpu")
            outcome = ["loaded", ""]
        except CheckpointError as error:
            outcome = ["refused", str(error)]
        except BaseException as error:
            outcome = [type(error).__name__, str(error)]
        seconds = round(time.process_time() - began, 3)
        print(json.dumps([path.stem, *outcome, seconds]), flush=True)


if __name__ == "__main__":  # FOLDER [NAME ...]: the names are files to build there first
    for name in sys.argv[2:]:
        build(Path(sys.argv[1]), name)
    main(Path(sys.argv[1]))
