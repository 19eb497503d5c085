"""Files made to harm their reader, and a program that tries them under hard limits.

`python -m tests.reliability.hostile FOLDER` loads every file of the folder and prints, a JSON line
each, its name and what came of it. Should one of them run code, that leaves the file `EXECUTED`.
"""

import io
import json
import os
import pickle
import resource
import socket
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from niels_gpt.checkpoint import load_checkpoint
from niels_gpt.config import to_dict
from niels_gpt.files.schema import content_digest
from niels_gpt.files.torchfile import CheckpointError
from tests.checkpoints import TINY, random_payload

CANARY = "EXECUTED"
COMMAND = f"touch {CANARY}"

Record = tuple[str, bytes]


def good() -> bytes:
    """Return a good checkpoint as a plain loop writes it, without a digest to hide other checks."""
    buffer = io.BytesIO()
    torch.save(random_payload(), buffer)
    return buffer.getvalue()


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


def any_zip(members: list[Record], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Write a zip with any members that ends as torch's do."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a name is there twice
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            for name, data in members:
                archive.writestr(name, data)
    return with_torch_end(buffer.getvalue())


def with_torch_end(data: bytes, **changes: int) -> bytes:
    """Put a zip64 record and its locator before the end of a zip."""
    end = data[-22:]
    members, length, offset = struct.unpack_from("<HII", end, 10)
    fields = {"members": members, "length": length, "offset": offset} | changes
    record = struct.pack(
        "<4sQHHIIQQQQ",
        b"PK\x06\x06",
        44,
        45,
        45,
        0,
        0,
        fields["members"],
        fields["members"],
        fields["length"],
        fields["offset"],
    )
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(data) - 22, 1)
    return data[:-22] + record + locator + end


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
    kept = [
        (name.partition("/")[2], data)
        for name, data in records
        if "/data/" in name or name.endswith("format_version")
    ]
    extra = [(f"data/{number}", bytes(64)) for number in (900, 901)]
    return torch_zip(("data.pkl", body), *kept, *extra)


def nested_lists(depth: int) -> bytes:
    """Ten times one list that holds ten times one list, ...: small in memory, endless to walk."""
    body = b"(]q\x00"
    for level in range(depth):
        body += b"](" + bytes([*b"h", level]) * 10 + b"eq" + bytes([level + 1])
    return b"}" + text("step") + body + b"ts"


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
        lambda: pickled(b"}" + text("step") + b"]q\x00h\x00as"),
        "deeper than",
    ),
    "deep nesting": (
        lambda: pickled(b"}" + text("step") + b"]" * 100_000 + b"a" * 99_999 + b"s"),
        "deeper than",
    ),
    "two million instructions": (
        lambda: pickled(b"}" + text("x") + b"](" + b"N" * 2_100_000 + b"es"),
        "more than 2000000 instructions",
    ),
    "a pickle of 20 MB": (lambda: pickled(text("x" * 20_000_000)), "no data.pkl of a valid size"),
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
    "a list as a key": (lambda: pickled(b"}]Ns"), "cannot be read"),
    "a tuple as a key": (lambda: pickled(b"})Ns"), "has a key of type tuple"),
    "an OrderedDict of nonsense": (lambda: pickled(ORDERED + b"(K\x05tR"), "cannot be read"),
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
        "cannot be read",
    ),
    "a storage of 10^15": (
        lambda: swapped(ln_f__bias=tensor(key="900", numel=10**15, size=(4,), stride=(1,))),
        "cannot be read",
    ),
    "a storage of negative size": (
        lambda: swapped(ln_f__bias=tensor(key="900", numel=-1, size=(4,), stride=(1,))),
        "cannot be read",
    ),
    "a view into a storage": (
        lambda: swapped(ln_f__bias=tensor(key="900", numel=16, size=(4,), stride=(1,), offset=2)),
        "does not fill its storage",
    ),
    "beyond the storage": (
        lambda: swapped(ln_f__bias=tensor(key="900", numel=16, size=(4,), stride=(1,), offset=99)),
        "cannot be read",
    ),
    "larger than the storage": (
        lambda: swapped(ln_f__bias=tensor(key="900", numel=16, size=(10**9,), stride=(1,))),
        "cannot be read",
    ),
    "a negative stride": (
        lambda: swapped(ln_f__bias=tensor(key="900", numel=16, size=(4,), stride=(-1,), offset=4)),
        "cannot be read",
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
        "cannot be read",
    ),
    "a storage of another folder": (
        lambda: swapped(ln_f__bias=tensor(key="../../etc/passwd", numel=4, size=(4,), stride=(1,))),
        "cannot be read",
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
    "a storage that is a tuple": (lambda: pickled(b")Q"), "cannot be read"),
    "a storage on its own": (
        lambda: pickled(
            b"}"
            + text("x")
            + b"("
            + text("storage")
            + b"ctorch\nFloatStorage\n"
            + text("0")
            + text("cpu")
            + b"K\x04tQs",
            _0=bytes(16),
        ),
        "x is a ",
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
        lambda: any_zip(
            [("a/data.pkl", b"\x80\x02}."), ("a/data/0", bytes(20_000_000))],
            compression=zipfile.ZIP_DEFLATED,
        ),
        "is compressed",
    ),
    "overlapping members": (lambda: overlapping(1000), "larger than the file|cannot be read"),
    "a member twice": (
        lambda: any_zip([*members_of(good()), ("archive/data.pkl", b"\x80\x02}.")]),
        "contains a member twice",
    ),
    "two folders": (
        lambda: any_zip([*members_of(good()), ("other/data.pkl", b"\x80\x02}.")]),
        "not written by torch.save",
    ),
    "a TorchScript archive": (
        lambda: torch_zip(
            ("data.pkl", b"\x80\x02}."), ("constants.pkl", b"\x80\x02)."), ("code/m.py", b"pass")
        ),
        "unknown member",
    ),
    "a path out of the zip": (
        lambda: any_zip([*members_of(good()), ("archive/../../etc/cron", b"")]),
        "unknown member",
    ),
    "no pickle": (lambda: torch_zip(("data/0", bytes(16))), "no data.pkl"),
    "an encrypted member": (lambda: flagged(good(), 1), "compressed or encrypted"),
    "a wrong CRC": (lambda: with_wrong_crc(good()), "its CRC does not match"),
    "a directory of 2^60 members": (
        lambda: with_torch_end(good()[:-98] + good()[-22:], members=2**60),
        "zip directory is damaged",
    ),
    "a directory of 2^60 bytes": (
        lambda: with_torch_end(good()[:-98] + good()[-22:], length=2**60),
        "zip directory is damaged",
    ),
    "66,000 members": (
        lambda: with_torch_end(good()[:-98] + good()[-22:], members=66_000),
        "zip directory is damaged",
    ),
    "big-endian numbers": (lambda: edited_byteorder(), "cannot be read|is not finite|lacks|big"),
    "the old format of torch": (
        lambda: saved(random_payload(), _use_new_zipfile_serialization=False),
        "not a torch.save file",
    ),
    "the tar format of torch": (legacy_tar, "not a torch.save file"),
    "a plain pickle": (lambda: pickle.dumps({"step": 1}), "not a checkpoint"),
    "an empty file": (lambda: b"", "not a checkpoint: 0 bytes"),
    "zeros": (lambda: bytes(100_000), "not a torch.save file"),
    "text": (lambda: b"PK\x03\x04 the quick brown fox\n" * 100, "not a torch.save file"),
    "an end alone": (lambda: with_torch_end(b"PK\x05\x06" + bytes(18)), "torch.save|no data.pkl"),
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
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(1_000_000))
        member = archive.infolist()[1]
        for i in range(copies):
            copy = zipfile.ZipInfo(f"a/data/{i + 1}")
            copy.header_offset, copy.CRC = member.header_offset, member.CRC
            copy.file_size = copy.compress_size = member.file_size
            archive.filelist.append(copy)
    return with_torch_end(buffer.getvalue())


def flagged(data: bytes, flag: int) -> bytes:
    """Set a flag bit in the directory entry of the first member."""
    copy = bytearray(data)
    copy[copy.index(b"PK\x01\x02") + 8] |= flag
    return bytes(copy)


def with_wrong_crc(data: bytes) -> bytes:
    copy = bytearray(data)
    copy[copy.index(b"PK\x01\x02") + 16] ^= 1
    return bytes(copy)


def edited_byteorder() -> bytes:
    members = [(n, b"big" if n.endswith("byteorder") else d) for n, d in members_of(good())]
    return any_zip(members)


# name -> (what makes the entry at the path, pattern of the refusal)
NODES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "a pipe that no one writes": (lambda path: os.mkfifo(path), "not a regular file"),
    "a link to endless zeros": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "cannot be read"),
    "a socket": (lambda path: _socket(path), "cannot be read|not a regular file"),
    "a terabyte of nothing": (lambda path: _sparse(path, 1 << 40), "larger than"),
    "ten gigabytes of nothing": (lambda path: _sparse(path, 10 << 30), "not a torch.save file"),
}


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))


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
    """Load each file under limits of memory, processor time and open files."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
    os.chdir(folder)
    for path in sorted(folder.glob("*.pt")):
        try:
            load_checkpoint(path, device="cpu")
            outcome = ["loaded", ""]
        except CheckpointError as error:
            outcome = ["refused", str(error)]
        except BaseException as error:
            outcome = [type(error).__name__, str(error)]
        print(json.dumps([path.stem, *outcome]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
