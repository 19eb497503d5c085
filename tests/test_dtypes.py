"""What a Mac's GPU can do: no double, complex or unsigned words, and a kernel for every operation.

MPS has no float64, and a machine without MPS cannot show it, so every operation is looked at.
"""

import re
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from niels_gpt import ModelConfig, TrainConfig, evaluate, make_state, train_step
from niels_gpt.config import OPTIMIZERS
from niels_gpt.loss import gradients
from tests.training import random_batch

CFG = ModelConfig(T=70, C=8, L=1, H=2, d_ff=8, dropout=0.1)
LEGAL = {torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool}


class Operations(TorchDispatchMode):
    """Collect every operation with the dtypes of its tensors."""

    def __init__(self):
        super().__init__()
        self.dtypes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        found = {t.dtype for t in leaves if isinstance(t, torch.Tensor)}
        found |= {dtype for dtype in leaves if isinstance(dtype, torch.dtype)}
        self.dtypes.setdefault(func, set()).update(found)
        return out


def steps_and_evaluation(optimizer):
    """A first state, steps over two blocks of rows and of queries, and an evaluation."""
    state = make_state(CFG, TrainConfig(B=15, eval_steps=1, optimizer=optimizer))
    for lr in (0.01, torch.tensor(0.01)):
        state, _ = train_step(state, random_batch(16, 70), lr)
    evaluate(state, bytes(range(256)), 1)


def mapped_step(optimizer):
    state = make_state(CFG, TrainConfig(optimizer=optimizer))
    batch, lrs = random_batch(2, 70), torch.tensor([0.01, 0.02])
    torch.func.vmap(lambda lr: train_step(state, batch, lr)[0].params)(lrs)


@pytest.fixture(
    scope="module",
    params=product([steps_and_evaluation, mapped_step], OPTIMIZERS),
    ids=lambda of: f"{of[0].__name__}-{of[1]}",
)
def operations(request):
    """The operations of one piece of work."""
    with Operations() as seen:
        work, optimizer = request.param
        work(optimizer)
    return seen.dtypes


def test_no_operation_uses_a_dtype_that_mps_lacks(operations):
    illegal = {str(op): dtypes - LEGAL for op, dtypes in operations.items() if dtypes - LEGAL}
    assert not illegal


def test_the_collection_sees_what_it_forbids():
    with Operations() as seen:
        torch.ones(1).double()
        torch.zeros(1, dtype=torch.complex64)
    assert {torch.float64, torch.complex64} <= set().union(*seen.dtypes.values())


def test_forward_and_backward_were_seen(operations):
    names = {str(op).split(".")[1] for op in operations}
    assert {"gelu", "gelu_backward", "embedding_dense_backward", "normal_"} <= names


def test_tangents_are_single_too():
    """Forward mode makes a scalar times a Python number double, and curvature runs through it."""
    params, batch = make_state(CFG, TrainConfig()).params, random_batch(16, 70)
    _, tangents = torch.func.jvp(lambda p: gradients(p, batch, CFG), (params,), (params,))
    assert {t.dtype for t in tree_leaves(tangents)} == {torch.float32}


def test_every_operation_has_a_kernel_on_mps(operations):
    lacking = sorted(str(op) for op in operations if not runs_on_mps(registered_name(op)))
    assert not lacking


def test_the_table_knows_what_mps_lacks():
    assert runs_on_mps("mm")
    assert runs_on_mps("add.Tensor")
    assert not runs_on_mps("geqrf")


def registered_name(op):
    return str(op).removeprefix("aten.").removesuffix(".default")


def runs_on_mps(name):
    """Return whether torch declares a kernel of this operator for MPS or for all devices."""
    entry = declared_operators()[name]
    if delegate := re.search(r"structured_delegate: (\S+)", entry):
        return runs_on_mps(delegate[1])
    kernels = entry.partition("dispatch:")[2]
    return not kernels or bool(re.search(r"^ +[^#\n]*\b(MPS|Composite\w+)\b", kernels, re.M))


@cache
def declared_operators():
    """Return the declaration of each operator of the installed torch."""
    packaged = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = packaged.read_text().split("\n- func: ")[1:]
    return {entry.partition("(")[0]: entry for entry in entries}
