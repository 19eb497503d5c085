"""`niels-gpt sample`: in process for what it prints, as a process for how it streams and ends."""

import json
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from niels_gpt.checkpoint import load_checkpoint
from niels_gpt.cli import main
from niels_gpt.config import ModelConfig
from niels_gpt.inference.generate import Sampling, generate
from tests.trained import SMALL, lively_state, save_lively

PROMPT = "The city"


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_lively(tmp_path_factory.mktemp("run") / "best.pt")


def sample(ckpt, *args, stdin=None):
    return CliRunner().invoke(main, ["sample", "--ckpt", str(ckpt), *args], input=stdin)


def expected(prompt, n, *, samples=(0,), seed=42, sampling=None):
    """Return what a script gets from the library."""
    texts = generate(
        lively_state().params,
        SMALL,
        prompt,
        n,
        seed=seed,
        samples=samples,
        sampling=sampling or Sampling(0.8),
    )
    return [(prompt + text).decode("utf-8", "replace") for text in texts]


# --- what it prints ----------------------------------------------------------------------------


def test_the_text_goes_on_from_the_prompt_on_stdout_and_the_rest_is_on_stderr(ckpt):
    result = sample(ckpt, "--prompt", PROMPT, "--max-bytes", "80")
    assert result.exit_code == 0, result.output
    assert result.stdout == expected(PROMPT.encode(), 80)[0] + "\n"
    assert "80 bytes in" in result.stderr


def test_the_settings_reach_the_sampler(ckpt):
    args = ["--temperature", "1.3", "--top-k", "20", "--top-p", "0.9", "--seed", "7"]
    result = sample(ckpt, "--prompt", PROMPT, "--max-bytes", "20", *args)
    text = expected(PROMPT.encode(), 20, seed=7, sampling=Sampling(1.3, 20, 0.9))[0]
    assert result.stdout == text + "\n"


def test_temperature_0_does_not_depend_on_the_seed(ckpt):
    args = ["--prompt", PROMPT, "--max-bytes", "20", "--temperature", "0"]
    assert sample(ckpt, *args).stdout == sample(ckpt, *args, "--seed", "3").stdout


def test_samples_of_a_batch_are_the_samples_alone(ckpt):
    result = sample(ckpt, "--prompt", PROMPT, "--max-bytes", "20", "-n", "3")
    texts = [expected(PROMPT.encode(), 20, samples=[i])[0] for i in range(3)]
    assert result.stdout == "".join(f"--- sample {i} ---\n{text}\n" for i, text in enumerate(texts))


def test_more_samples_than_a_group_are_all_there_in_order(ckpt):
    result = sample(ckpt, "--max-bytes", "3", "-n", "70", "--json")
    samples = json.loads(result.stdout)["samples"]
    assert [s["sample"] for s in samples] == list(range(70))
    assert "\n" + samples[69]["text"] == expected(b"\n", 3, samples=[69])[0]


def test_json_tells_all_that_the_text_depends_on(ckpt):
    result = sample(ckpt, "--prompt", "é", "--max-bytes", "9", "--top-k", "5", "--json")
    report = json.loads(result.stdout)
    text = report["samples"][0].pop("text")
    assert "é" + text == expected("é".encode(), 9, sampling=Sampling(0.8, 5))[0]
    assert report == {
        "checkpoint": str(ckpt),
        "step": 0,
        "seed": 42,
        "temperature": 0.8,
        "top_k": 5,
        "top_p": None,
        "prompt": "é",
        "samples": [{"sample": 0, "bytes": 9}],
    }


def test_a_prompt_from_stdin_is_taken_byte_by_byte(ckpt):
    half = "Zoë".encode()[:-1]  # the model may complete the character
    result = sample(ckpt, "--prompt", "-", "--max-bytes", "30", stdin=half)
    assert result.stdout == expected(half, 30)[0] + "\n"


def test_a_prompt_longer_than_the_context_is_seen_from_the_window_on(ckpt):
    prompt = "ab" * 100
    result = sample(ckpt, "--prompt", prompt, "--max-bytes", "9")
    assert result.stdout == expected(prompt.encode(), 9)[0] + "\n"
    assert "note: the prompt has 200 bytes; the last 40 are seen" in result.stderr


def test_no_prompt_begins_a_new_line(ckpt):
    result = sample(ckpt, "--max-bytes", "9")
    assert "\n" + result.stdout == expected(b"\n", 9)[0] + "\n"


def test_no_bytes_are_a_legal_number_of_bytes(ckpt):
    assert sample(ckpt, "--prompt", "a", "--max-bytes", "0").stdout == "a\n"


# --- what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature", "-1"], "temperature must be finite and 0 or more, got -1.0"),
        (["--temperature", "nan"], "temperature must be finite and 0 or more, got nan"),
        (["--top-k", "0"], "top_k must be 1 or more, got 0"),
        (["--top-p", "0"], "top_p must be above 0 and at most 1, got 0.0"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--max-bytes", "-1"], "--max-bytes"),
        (["-n", "0"], "-n"),
        (["--seed", "x"], "--seed"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(ckpt, args, message):
    result = sample(ckpt, *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_bad_checkpoints_are_refused_by_name(tmp_path, ckpt):
    damaged = tmp_path / "damaged.pt"
    data = bytearray(ckpt.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    few = save_lively(tmp_path / "few.pt", ModelConfig(V=16, T=8, C=4, L=1, H=1, d_ff=4))
    for path in (tmp_path / "missing.pt", tmp_path, damaged, few):
        result = sample(path)
        assert result.exit_code == 2
        assert str(path) in result.stderr
        assert result.stdout == ""


def test_a_model_of_another_program_and_unknown_training_is_loaded(tmp_path, ckpt):
    import torch

    payload = load_checkpoint(ckpt, device="cpu")
    payload |= {"train_cfg": {"my_lr": 1}, "optimizer_state": None}
    del payload["digest"]
    torch.save(payload, tmp_path / "theirs.pt")
    args = ["--prompt", PROMPT, "--max-bytes", "9"]
    assert sample(tmp_path / "theirs.pt", *args).stdout == sample(ckpt, *args).stdout


# --- as a process ------------------------------------------------------------------------------


def start(ckpt, *args):
    command = [sys.executable, "-m", "niels_gpt", "sample", "--ckpt", str(ckpt), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_text_streams_and_ctrl_c_ends_it_with_130(ckpt):
    with start(ckpt, "--prompt", "Hello", "--max-bytes", "1000000000") as process:
        assert process.stdout.read(20).startswith(b"Hello")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.strip() == b""


def test_a_reader_that_goes_away_ends_it_without_a_word(ckpt):
    with start(ckpt, "--prompt", "Hello", "--max-bytes", "1000000000") as process:
        assert process.stdout.read(5) == b"Hello"
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0
    assert errors == b""
