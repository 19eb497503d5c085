"""A device that computes something else, or something else each time, is noticed."""

import json

import pytest
import torch

from niels_gpt import ModelConfig
from niels_gpt.run import selfcheck
from tests.metal import DEVICE, Faulty, Metal

SMALL = ModelConfig(T=16, C=8, L=1, H=2, d_ff=8)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(selfcheck, "MODEL", SMALL)


def failed(device):
    with device:
        return {check.name for check in selfcheck.selfcheck(str(DEVICE)) if not check.passed}


def test_a_device_that_does_as_the_cpu_passes():
    assert failed(Metal()) == set()


def test_rounding_passes():
    assert failed(Faulty("bmm", 1e-6)) == set()


def test_wrong_products_are_noticed():
    found = failed(Faulty("bmm", 0.1))
    assert {"gradients as on the CPU", "the next byte as on the CPU"} <= found
    assert "gradients, twice" not in found


def test_sums_in_another_order_each_time_are_noticed():
    found = failed(Faulty("mm", 1e-6, each_time=True))
    assert found == {"gradients, twice", "4 steps of adamw, twice", "4 steps of muon, twice"}


def test_wrong_masks_are_noticed():
    assert "dropout masks as on the CPU" in failed(Faulty("bitwise_xor", 1))


def test_the_command_tells_the_verdict(niels):
    result = niels("selfcheck", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "cpu: as it should be"
    value = json.loads(niels("selfcheck", "--device", "cpu", "--json").stdout)
    assert value["passed"]
    assert value["torch"] == torch.__version__
    assert len(value["checks"]) == 10


def test_a_failure_is_exit_code_1(niels, monkeypatch):
    monkeypatch.setattr(selfcheck, "TOLERANCE", -1)
    result = niels("selfcheck", "--device", "cpu")
    assert result.exit_code == 1
    assert "FAILED  gradients as on the CPU" in result.stdout
    assert "4 of 10 checks failed: train with --device cpu" in result.stdout
