"""Which device is used, and which names are refused."""

import platform

import pytest
import torch

from niels_gpt import device
from niels_gpt.device import get_device, resolve_device


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_cuda_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_without_a_gpu_the_device_is_the_cpu(no_gpu):
    assert get_device() == resolve_device(None) == resolve_device("cpu") == "cpu"


def test_mps_is_taken_where_it_is(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert get_device() == resolve_device(None) == resolve_device("mps") == "mps"


def test_cuda_is_never_taken_unasked(two_cuda_cards):
    assert get_device() != "cuda"
    assert resolve_device(None) != "cuda"


def test_cuda_may_be_asked_for(two_cuda_cards):
    assert [resolve_device(name) for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    with pytest.raises(ValueError, match=r"'cuda:2' .* there are 2"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["mps", "cuda", "cuda:0"])
def test_a_device_that_is_absent_is_refused(no_gpu, name):
    with pytest.raises(ValueError, match=f"device '{name}' is not available.*use cpu"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["", "CPU", "gpu", "tpu", "meta", "cpu:1", "cuda:", "cuda:-1"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=f"unknown device '{name}'; use cpu, mps, cuda"):
        resolve_device(name)


def test_glibc_takes_the_setting_and_others_are_left_alone(monkeypatch):
    assert device.keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", None)
    assert not device.keep_freed_memory()
