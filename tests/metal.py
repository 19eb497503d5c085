"""A stand-in for a Mac's GPU: its rules, and memory of its own.

Tensors on the device "meta:1", which every torch knows, are given memory here. Each operation on
them is looked at by `RULES` and carried out by the CPU. As on a Mac, only a copy brings a tensor
from main memory to the device or back, and an operation on both is a fault.

It cannot show what Metal computes. `linear` and other operations that torch composes of smaller
ones everywhere but on MPS are seen in their parts.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchgen
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta", 1)  # "meta" alone stays what it is: without memory


class OnDevice(Tensor):
    """A tensor on the device: one in main memory that only `Metal` sees."""

    memory: Tensor

    @staticmethod
    def __new__(cls, memory: Tensor) -> "OnDevice":
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            memory.shape,
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device=DEVICE,
        )
        made.memory = memory
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} where there is no device")


class Operation(NamedTuple):
    """An operation as it was carried out."""

    func: Any
    args: Any
    kwargs: Any
    out: Any

    @property
    def name(self) -> str:
        """The name without its overload, the same for the operation in place."""
        return str(self.func._overloadpacket.__name__).rstrip("_")

    @property
    def operands(self) -> list[Tensor]:
        """The operands on the device, as they lie in its memory."""
        return [t.memory for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, OnDevice)]

    @property
    def is_view(self) -> bool:
        """Whether the result is the same memory, seen in another way."""
        aliases = [argument.alias_info for argument in self.func._schema.arguments]
        return any(alias is not None and not alias.is_write for alias in aliases)


class Copied(TorchFunctionMode):
    """Turns numbers to tensors and back in main memory, as torch does for every real device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


class Metal(TorchDispatchMode):
    """Has the device while it is active, and collects what breaks a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.copied = Copied()
        self.faults: set[str] = set()
        self.names: set[str] = set()

    def __enter__(self) -> "Metal":
        self.copied.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.copied.__exit__(*raised)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Look at the parts of an operation too."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, OnDevice)]
        device = kwargs.get("device")
        if device != DEVICE and not operands:
            return func(*args, **kwargs)
        # in inference mode, composed operations come whole
        with torch._C.DisableTorchFunction(), self.looking():
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = self.compute(func, *tree_map(_in_memory, (args, _on_the_cpu(kwargs))))
        if device in (None, DEVICE):
            known = {id(t.memory): t for t in operands}
            out = tree_map(lambda t: known[id(t)] if id(t) in known else _on_device(t), out)
        done = Operation(func, args, kwargs, out)
        self.names.add(done.name)
        self.faults |= {f"{func}: {fault}" for rule in RULES for fault in rule(done)}
        return out

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Carry out an operation in main memory; subnormal numbers count as 0, as on a Mac.

        Zeros without memory, which forward mode makes, are known above this mode only: give them
        memory.
        """
        if func._overloadpacket is torch.ops.aten._efficientzerotensor:
            return torch.zeros(*args, **kwargs)
        torch.set_flush_denormal(True)
        try:
            return func(*args, **kwargs)
        finally:
            torch.set_flush_denormal(False)


class Faulty(Metal):
    """A device on which one operation is off by a share of its result, or by another each time."""

    def __init__(self, operation: str, error: float, *, each_time: bool = False) -> None:
        super().__init__()
        self.operation, self.error, self.each_time = operation, error, each_time

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Carry out an operation, with the fault."""
        out = super().compute(func, args, kwargs)
        if func._overloadpacket.__name__ != self.operation:
            return out
        self.error *= 1.01 if self.each_time else 1
        return out * (1 + self.error)


def _in_memory(t: Any) -> Any:
    return t.memory if isinstance(t, OnDevice) else t


def _on_device(t: Any) -> Any:
    with torch.inference_mode(False):  # a view, made in that mode too, is as its base was made
        return OnDevice(t) if isinstance(t, Tensor) else t


def _on_the_cpu(kwargs: Any) -> Any:
    return {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") == DEVICE else kwargs


# --- what MPS lacks, misreads, or adds in another order each time --------------------------------

LEGAL = {torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot"}
ADDERS = {"embedding_dense_backward", "index_add", "scatter_add", "scatter_reduce", "index_reduce"}
PUTTERS = {"index_put", "_index_put_impl", "_unsafe_index_put", "put"}
COPIES = {"_to_copy", "copy"}
MAX_INNER = 32_766


def lacks_a_kernel(op: Operation) -> Iterator[str]:
    if not runs_on_mps(str(op.func).removeprefix("aten.").removesuffix(".default")):
        yield "no kernel"


def has_a_wrong_dtype(op: Operation) -> Iterator[str]:
    leaves = tree_leaves((op.args, op.kwargs, op.out))
    dtypes = {t.dtype for t in leaves if isinstance(t, OnDevice)}
    dtypes |= {t for t in leaves if isinstance(t, torch.dtype)}
    yield from (str(dtype) for dtype in dtypes - LEGAL)


def adds_in_any_order(op: Operation) -> Iterator[str]:
    """Atomics add in the order in which threads arrive; a sum of integers does not depend on it."""
    accumulates = op.kwargs.get("accumulate", op.args[3] if len(op.args) > 3 else False)
    reduces = op.name == "scatter" and "reduce" in str(op.func)
    adds = op.name in ADDERS or (op.name in PUTTERS and accumulates) or reduces
    if adds and any(t.is_floating_point() for t in op.operands):
        yield "adds by atomics"


def repeats_an_operand(op: Operation) -> Iterator[str]:
    """Some versions of macOS misread a matrix that is repeated by a stride of 0."""
    if op.name in PRODUCTS:
        for t in op.operands:
            if any(step == 0 and n > 1 for step, n in zip(t.stride(), t.shape, strict=True)):
                yield f"stride 0 in {tuple(t.shape)}"


def has_long_rows(op: Operation) -> Iterator[str]:
    """On M1 and M2 products of longer rows are wrong; that of two vectors is made by a sum."""
    if op.name in PRODUCTS - {"dot"} and (inner := op.operands[-2].shape[-1]) > MAX_INNER:
        yield f"inner size {inner}"


def starts_between_words(op: Operation) -> Iterator[str]:
    """A view that does not start at a multiple of 4 bytes is misread once it is computed with."""
    for t in [] if op.is_view else op.operands:
        if t.numel() and t.storage_offset() * t.element_size() % 4:
            yield f"{t.dtype} from byte {t.storage_offset() * t.element_size()}"


def mixes_devices(op: Operation) -> Iterator[str]:
    """Numbers in main memory may be operands, but in the middle of a tensor they are misread."""
    for t in tree_leaves((op.args, op.kwargs)):
        if isinstance(t, Tensor) and t.device.type == "cpu":
            if t.ndim == 0 and t.storage_offset():
                yield f"a number at place {t.storage_offset()} of a tensor on the CPU"
            elif t.ndim and op.name not in COPIES:
                yield f"two devices, {tuple(t.shape)} on the CPU"


RULES: list[Callable[[Operation], Iterator[str]]] = [
    lacks_a_kernel,
    has_a_wrong_dtype,
    adds_in_any_order,
    repeats_an_operand,
    has_long_rows,
    starts_between_words,
    mixes_devices,
]


def runs_on_mps(name: str) -> bool:
    """Return whether torch declares a kernel of this operator for MPS or for all devices."""
    entry = _declared_operators().get(name, "dispatch: none")
    if delegate := re.search(r"structured_delegate: (\S+)", entry):
        return runs_on_mps(delegate[1])
    kernels = entry.partition("dispatch:")[2]
    return not kernels or bool(re.search(r"^ +[^#\n]*\b(MPS|Composite\w+)\b", kernels, re.M))


@cache
def _declared_operators() -> dict[str, str]:
    """Return the declaration of each operator of the installed torch."""
    packaged = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = packaged.read_text().split("\n- func: ")[1:]
    return {entry.partition("(")[0]: entry for entry in entries}
