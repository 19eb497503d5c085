"""Which device is used, and which names are refused."""

import os
import platform
import resource
import subprocess
import sys

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


# --- limits ------------------------------------------------------------------------------------

GB = 10**9


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Return a function that replaces the cgroups of this process."""

    def replace(own, **files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            file = tmp_path / "fs" / name.replace("__", "/").replace("_dot_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        monkeypatch.setattr(device, "OWN_CGROUPS", tmp_path / "own")
        monkeypatch.setattr(device, "CGROUPS", tmp_path / "fs")

    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 16 * GB}.get(name, 1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    return replace


@pytest.mark.parametrize(
    ("own", "files", "memory", "processors"),
    [
        ("0::/\n", {"memory_dot_max": "max", "cpu_dot_max": "max 100000"}, 16 * GB, 8),
        ("0::/\n", {"memory_dot_max": f"{GB}", "cpu_dot_max": "150000 100000"}, GB, 2),
        ("0::/a/b\n", {"a__memory_dot_max": f"{GB}", "a__b__memory_dot_max": "max"}, GB, 8),
        (
            "0::/a/b\n",
            {"a__cpu_dot_max": "50000 100000", "a__b__cpu_dot_max": "200000 100000"},
            16 * GB,
            1,
        ),
        (
            "5:cpu,cpuacct:/x\n4:memory:/docker/x\n1:name=systemd:/\n",
            {
                "memory__memory_dot_limit_in_bytes": f"{2 * GB}",
                "cpu,cpuacct__cpu_dot_cfs_quota_us": "300000",
                "cpu,cpuacct__cpu_dot_cfs_period_us": "100000",
            },
            2 * GB,
            3,
        ),
        (
            "5:cpu:/\n4:memory:/\n",
            {
                "memory__memory_dot_limit_in_bytes": "9223372036854771712",
                "cpu__cpu_dot_cfs_quota_us": "-1",
                "cpu__cpu_dot_cfs_period_us": "100000",
            },
            16 * GB,
            8,
        ),
        ("0::/gone\n", {}, 16 * GB, 8),
        ("", {}, 16 * GB, 8),
    ],
)
def test_the_limits_of_a_container_count(cgroups, own, files, memory, processors):
    cgroups(own, **files)
    assert (device.available_memory(), device.available_processors()) == (memory, processors)


def test_the_limits_of_a_process_count(cgroups, monkeypatch):
    cgroups("0::/\n")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (3 * GB, 4 * GB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    assert (device.available_memory(), device.available_processors()) == (3 * GB, 1)


def test_memory_estimates_know_the_limit(cgroups):
    from niels_gpt.analysis.sweep import memory_budget
    from niels_gpt.run import dry_run

    cgroups("0::/\n", memory_dot_max=f"{GB}")
    assert memory_budget() == GB // 2
    assert dry_run.available_memory() == GB


def test_threads_are_lowered_to_the_processors_but_never_raised(cgroups, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cgroups("0::/\n", cpu_dot_max="200000 100000")
    for before, after in ((4, 2), (2, 2), (1, 1)):
        torch.set_num_threads(before)
        device.limit_threads()
        assert torch.get_num_threads() == after
    torch.set_num_threads(4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    device.limit_threads()
    assert torch.get_num_threads() == 4


def test_a_run_limits_its_threads(cgroups, niels, texts, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cgroups("0::/\n", cpu_dot_max="100000 100000")
    torch.set_num_threads(2)
    model = ["model.T=8", "model.C=8", "model.L=1", "model.H=2", "model.d_ff=8", "train.B=2"]
    (texts / "empty.json").write_text("{}")
    words = ["--config", texts / "empty.json", "--wiki", texts / "wiki", "--roam", texts / "notes"]
    sets = [word for value in model for word in ("--set", value)]
    result = niels("train", *words, *sets, "--set", "train.eval_steps=1", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert torch.get_num_threads() == 1


# --- waiting ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("load", "spins"), [(0.0, device.SPINS), (3.0, device.SPINS_BUSY)])
def test_threads_wait_more_politely_on_a_busy_machine(monkeypatch, load, spins):
    monkeypatch.setattr(device, "available_processors", lambda: 2)
    monkeypatch.setattr(device.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "environ", {})
    device.share_processors()
    assert os.environ == {"GOMP_SPINCOUNT": str(spins)}
    assert device.is_busy() == (load > 1)


@pytest.mark.parametrize("name", device.WAITING)
def test_a_way_of_waiting_that_is_chosen_already_stays(monkeypatch, name):
    monkeypatch.setattr(os, "environ", {name: "PASSIVE"})
    device.share_processors()
    assert os.environ == {name: "PASSIVE"}


TWO_THREADS = """
import sys
from niels_gpt.device import share_processors
share_processors()
import torch
from niels_gpt import ModelConfig, TrainConfig, make_state, train_step
from niels_gpt.optim.trees import to_vector
torch.set_num_threads(2)
state = make_state(ModelConfig(T=64, C=64, L=1, H=2, d_ff=256), TrainConfig(B=8))
x = torch.arange(8 * 64).view(8, 64) % 251
state, _ = train_step(state, (x, (x + 1) % 251), 0.01)
print(to_vector(state.params).view(torch.uint8).tolist())
"""


def test_no_bit_depends_on_how_threads_wait():
    without = {name: value for name, value in os.environ.items() if name not in device.WAITING}
    found = {
        subprocess.run(
            [sys.executable, "-c", TWO_THREADS],
            env={**without, **way},
            capture_output=True,
            check=True,
        ).stdout
        for way in ({"GOMP_SPINCOUNT": "0"}, {"OMP_WAIT_POLICY": "ACTIVE"})
    }
    assert len(found) == 1
