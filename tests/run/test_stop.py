"""Signals: the first one stops the run, whatever follows; only a person can cut that short."""

import os
import pkgutil
import signal
import subprocess
import sys
from signal import SIGHUP, SIGINT, SIGTERM

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.checkpoint import open_checkpoint
from niels_gpt.run import stop
from niels_gpt.run.stop import PATIENCE, Stop, Stopped
from tests import ROOT
from tests.reliability.signalled import signalling


class Cut(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def cut(monkeypatch):
    def end(code):
        raise Cut(code)

    monkeypatch.setattr(os, "_exit", end)


@given(
    signals=st.lists(
        st.tuples(st.sampled_from(stop.SIGNALS), st.floats(0, 2 * PATIENCE)), min_size=1
    )
)
def test_only_a_ctrl_c_a_second_after_the_first_signal_ends_at_once(signals):
    """Each signal comes so many seconds after the one before."""
    with pytest.MonkeyPatch.context() as patch, Stop().active() as handled:
        clock, cuts, since = 100.0, [], None
        patch.setattr(os, "_exit", cuts.append)
        for number, pause in signals:
            clock += pause
            since = clock if since is None else since
            patch.setattr(stop.time, "monotonic", lambda now=clock: now)
            before = len(cuts)
            signal.raise_signal(number)
            is_cut = number == SIGINT and clock - since > PATIENCE
            assert cuts[before:] == [130] * is_cut
        with pytest.raises(Stopped) as stopped:
            handled.check()
    assert stopped.value.signum == signals[0][0]


@pytest.mark.parametrize("swallowed", [True, False])
def test_a_stop_that_a_library_swallows_or_turns_into_an_error_is_a_stop(swallowed):
    def library():
        try:
            signal.raise_signal(SIGTERM)
        except BaseException as error:
            if not swallowed:
                raise RuntimeError("import failed") from error

    with Stop().active() as handled, pytest.raises(Stopped), handled.immediately():
        library()


def test_no_signal_changes_how_a_stopped_process_ends(monkeypatch):
    seen = []
    before = signal.signal(SIGTERM, lambda number, frame: seen.append(number))
    try:
        for stopped in (False, True):
            with Stop().active():
                if stopped:
                    signal.raise_signal(SIGHUP)
            signal.raise_signal(SIGTERM)
            assert seen == [SIGTERM]
        later = stop.time.monotonic() + 2 * PATIENCE
        monkeypatch.setattr(stop.time, "monotonic", lambda: later)
        signal.raise_signal(SIGTERM)
        signal.raise_signal(SIGTERM)
        assert seen == [SIGTERM] * 3
    finally:
        signal.signal(SIGTERM, before)


def test_an_error_without_a_signal_stays_what_it_is():
    with Stop().active() as handled, pytest.raises(KeyError), handled.immediately():
        raise KeyError("x")


PHASES = {  # of a run with a state: where, and which call
    "opening": ("niels_gpt.run.session.say_opening", 1),
    "compiling": ("niels_gpt.run.session.choose_step", 1),
    "first batch": ("niels_gpt.step.get_batch", 1),
    "step": ("niels_gpt.step.get_batch", 4),
    "evaluation": ("niels_gpt.eval.get_batch", 2),
    "save": ("niels_gpt.files.durable.write_durably", 7),
    "metrics": ("niels_gpt.files.durable.append_bytes", 5),
}
MIXES = [
    (SIGHUP, SIGHUP),  # a terminal that is closed
    (SIGHUP, SIGTERM, SIGINT),
    (SIGINT, SIGINT, SIGINT),
    (SIGTERM, SIGHUP),
]


WHOLE: list[str] = []  # the digest of the end of the run, once it is known


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "+".join(n.name for n in mix))
def test_any_mix_of_signals_in_any_phase_saves_and_says_so(
    train, tmp_path, monkeypatch, cut, phase, mix
):
    where, nth = PHASES[phase]
    with monkeypatch.context() as patch:
        patch.setattr(where, signalling(pkgutil.resolve_name(where), nth, mix))
        result = train("--out", "out", "--compile" if phase == "compiling" else "--no-compile")
    assert result.exit_code == 128 + mix[0], result.output
    latest = open_checkpoint(tmp_path / "out" / "latest.pt")
    assert f"stopped by {mix[0].name}; last good checkpoint: out/latest.pt" in result.stderr
    assert "--resume out/latest.pt" in result.stderr
    assert latest.step < 8
    resumed = train("--resume", "out/latest.pt", "--no-compile")
    assert resumed.exit_code == 0, resumed.output
    if not WHOLE:  # the same for all of these
        assert train("--out", "whole", "--no-compile").exit_code == 0
        WHOLE.append(open_checkpoint(tmp_path / "whole" / "latest.pt").digest)
    assert open_checkpoint(tmp_path / "out" / "latest.pt").digest == WHOLE[0]


def test_a_terminal_that_is_closed_leaves_a_checkpoint(train, texts, tmp_path):
    """Its output ends in errors, and SIGHUP comes from the kernel and from the shell."""
    mine, its = os.openpty()
    command = ["--config", "c.json", "--device", "cpu", "--wiki", texts / "wiki", "--out", "out"]
    command += ["--roam", texts / "notes", "--set", "train.total_steps=1000000"]
    command += ["--set", "train.ckpt_every=1000000"]
    start = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    run = "from niels_gpt.train import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", start + run, *map(str, command)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=its,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    try:
        told = b""
        while b"step      5/" not in told:
            more = os.read(mine, 1000)
            assert more, told
            told += more
        os.close(mine)
        process.send_signal(SIGHUP)
        assert process.wait(timeout=120) == 128 + SIGHUP
    finally:
        process.kill()
    assert open_checkpoint(tmp_path / "out" / "latest.pt").step >= 5
