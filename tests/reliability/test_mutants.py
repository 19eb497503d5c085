"""Broken versions of the saver and the loader; the other tests must catch each of them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import ROOT

pytestmark = pytest.mark.reliability


DURABLE = "tests/files/test_durable.py"
CHECKPOINT = "tests/test_checkpoint.py"
ROUND_TRIP = "tests/test_checkpoint_roundtrip.py"
HOSTILE = "tests/reliability/test_hostile_files.py"
TRAIN = "tests/test_train.py"
OPTIMIZERS = "tests/optim/test_optim.py"
CONTAINER = "tests/files/test_container.py"
DAMAGED = "tests/reliability/test_damaged_files.py"


class Mutant(NamedTuple):
    """Replace `old` by `new` in `module`; the `tests` selected by `-k chosen` must fail."""

    module: str
    old: str
    new: str
    tests: str
    chosen: str


MUTANTS = {
    "no fsync of the file": Mutant(
        "files/durable",
        "                _flush(fd)\n            os.rename",
        "            os.rename",
        DURABLE,
        "each_name_is_durable",
    ),
    "no fsync of the folder": Mutant(
        "files/durable",
        "        raise\n    _sync_folder(path.parent)",
        "        raise",
        DURABLE,
        "each_name_is_durable",
    ),
    "rename before fsync": Mutant(
        "files/durable",
        "                _flush(fd)\n            os.rename(temporary, path)",
        "                os.rename(temporary, path)\n                _flush(fd)",
        DURABLE,
        "each_name_is_durable",
    ),
    "a drive that fails to flush": Mutant(
        "files/durable",
        "            if error.errno not in _UNSUPPORTED:\n                raise\n",
        "            pass\n",
        DURABLE,
        "fails_to_flush",
    ),
    "direct write": Mutant(
        "files/durable",
        "    temporary = path.with_name(",
        "    path.unlink(missing_ok=True)\n    temporary = path or path.with_name(",
        DURABLE,
        "error_anywhere",
    ),
    "short writes treated as complete": Mutant(
        "files/durable",
        "rest = rest[written:]",
        "rest = rest[len(rest) :]",
        DURABLE,
        "short_writes",
    ),
    "temporary file left after an error": Mutant(
        "files/durable",
        "            temporary.unlink(missing_ok=True)",
        "            pass",
        DURABLE,
        "no_progress",
    ),
    "errors without the path": Mutant(
        "files/durable",
        "raise OSError(error.errno, error.strerror, str(path)) from error",
        "raise",
        DURABLE,
        "missing_folder",
    ),
    "names written in another order": Mutant(
        "files/durable",
        "    for path in paths:\n        _replace(path, data)",
        "    for path in reversed(paths):\n        _replace(path, data)",
        DURABLE,
        "each_name_is_durable",
    ),
    "no lock": Mutant(
        "files/durable",
        "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        DURABLE,
        "held_folder",
    ),
    "a lock that waits": Mutant(
        "files/durable", "LOCK_EX | fcntl.LOCK_NB", "LOCK_SH", DURABLE, "held_folder"
    ),
    "a lock inherited by child processes": Mutant(
        "files/durable",
        "    with _closing(fd):\n        try:\n            with _named(path):\n",
        "    with _closing(fd):\n        os.set_inheritable(fd, True)\n        try:\n"
        "            with _named(path):\n",
        DURABLE,
        "children_of_a_killed",
    ),
    "moving aside into a folder in use": Mutant(
        "files/durable",
        "            aside.mkdir()",
        "            aside.mkdir(exist_ok=True)",
        DURABLE,
        "never_overwrites",
    ),
    "a failed append left incomplete": Mutant(
        "files/durable",
        "                    os.ftruncate(fd, size)",
        "                    pass",
        DURABLE,
        "failed_append",
    ),
    "no digest check": Mutant(
        "schema",
        'payload["digest"] != content_digest(payload)',
        "False",
        CHECKPOINT,
        "digest_covers",
    ),
    "a digest without dtypes": Mutant(
        "schema",
        'f"tensor {value.dtype} {tuple',
        'f"tensor {tuple',
        CHECKPOINT,
        "digest_covers",
    ),
    "a digest that treats tuples as lists": Mutant(
        "schema",
        'yield f"{kind} {len(value)};"',
        'yield f"list {len(value)};"',
        CHECKPOINT,
        "digest_covers",
    ),
    "no check of the CRCs": Mutant(
        "files/container", " or zlib.crc32(buffer) != member.crc", "", DAMAGED, "single_bits"
    ),
    "any global in the pickle": Mutant(
        "files/torchfile",
        "if text not in (_DICT, _TENSOR, *_DTYPES)",
        "if False",
        HOSTILE,
        "system or bytearray",
    ),
    "any instruction in the pickle": Mutant(
        "files/torchfile",
        'raise CheckpointError(f"data.pkl uses {opcode.name}, which no checkpoint needs")',
        "continue",
        HOSTILE,
        "INST or EXT1",
    ),
    "any call in the pickle": Mutant(
        "files/torchfile",
        "case (_Global(name), ()) if name == _DICT:",
        "case (name, _) if name != _Global(_TENSOR):",
        HOSTILE,
        "nonsense or text",
    ),
    "an endless number of tensors": Mutant(
        "files/torchfile", " and self.tensors < MAX_TENSORS", "", HOSTILE, "660"
    ),
    "keys that take forever to hash": Mutant(
        "files/torchfile",
        "if problem := next(filter(None, map(key_problem, items[::2])), None)",
        "if problem := None",
        HOSTILE,
        "collide or tuple",
    ),
    "tensors beyond their storage": Mutant(
        "files/torchfile", "if last >= values.numel() and all(size)", "if False", HOSTILE, "storage"
    ),
    "storages of any size": Mutant(
        "files/torchfile", " or member.size != numel * dtype.itemsize", "", HOSTILE, "record or 10"
    ),
    "storages that no tensor uses": Mutant(
        "files/torchfile",
        "if unused := members.keys() - small.keys() - storages.found.keys()",
        "if unused := set()",
        HOSTILE,
        "storage",
    ),
    "any byte order": Mutant(
        "files/torchfile", "text != sys.byteorder.encode()", "False", HOSTILE, "endian"
    ),
    "nothing checked of what was serialised": Mutant(
        "schema", "        check_torch_file(file)\n", "", CHECKPOINT, "too_long"
    ),
    "models of any size begun": Mutant(
        "run/plan",
        "    _check_size(model_cfg, train_cfg)\n",
        "",
        "tests/run/test_plan.py",
        "refused",
    ),
    "tensors of any size serialised": Mutant(
        "schema", "if size > MAX_TENSOR_BYTES", "if False", CHECKPOINT, "too_large"
    ),
    "duplicate members allowed": Mutant(
        "files/container", "if len(set(names)) < len(names)", "if False", HOSTILE, "twice"
    ),
    "compressed members allowed": Mutant(
        "files/container",
        "if entry.method or entry.flags & _ENCRYPTED",
        "if False",
        HOSTILE,
        "bomb or encrypted",
    ),
    "any member name allowed": Mutant(
        "files/container", "if not _NAME.fullmatch(entry.name) or", "if", HOSTILE, "TorchScript"
    ),
    "any kind of file opened": Mutant(
        "files/torchfile", "if not stat.S_ISREG(info.st_mode)", "if False", HOSTILE, "endless"
    ),
    "an end that contradicts its position": Mutant(
        "files/container", "if end != (*record, *locator, *old) or", "if", HOSTILE, "locator or end"
    ),
    "a directory anywhere": Mutant(
        "files/container", " or at + _END.size != size", "", HOSTILE, "gap"
    ),
    "any extra field in the directory": Mutant(
        "files/container",
        "    if len(extra) != form.size or form.unpack(extra)[:2] != (_ZIP64, 8 * count) or not",
        "    if False and not",
        HOSTILE,
        "entry",
    ),
    "any flags": Mutant(
        "files/container",
        "if entry.flags != _UTF8 | _HAS_DESCRIPTOR and (entry.flags != _UTF8 or entry.size)",
        "if False",
        HOSTILE,
        "flags",
    ),
    "any header": Mutant(
        "files/container",
        "        header != front + entry.name\n        or ",
        "",
        HOSTILE,
        "header",
    ),
    "any extra field in a header": Mutant(
        "files/container",
        "        or not extra.startswith(_padding(entry, extra_length))\n",
        "",
        HOSTILE,
        "header",
    ),
    "gaps between members": Mutant(
        "files/container",
        "        or at + len(descriptor) != end\n",
        "",
        HOSTILE,
        "behind or between",
    ),
    "any descriptor": Mutant(
        "files/container",
        "        or _read(file, at, len(descriptor)) != descriptor\n",
        "",
        HOSTILE,
        "descriptor",
    ),
    "bytes in front of the first member": Mutant(
        "files/container", "if entry.offset != start", "if False", HOSTILE, "front"
    ),
    "members that are folders": Mutant(
        "files/container",
        "disk, attributes)\n",
        "disk, bytes(6))\n",
        CONTAINER,
        "every_reader",
    ),
    "formats that readers do not know": Mutant(
        "files/container",
        " or version > MAX_VERSION",
        "",
        CONTAINER,
        "every_reader",
    ),
    "shared storages allowed": Mutant(
        "schema",
        "if owner is not where and {_name(owner), _name(where)} != set(TIED)",
        "if False",
        CHECKPOINT,
        "content_that_is_not_right",
    ),
    "views allowed": Mutant(
        "schema",
        "not t.is_contiguous() or t.storage_offset() != 0 or storage.nbytes() != t.nbytes",
        "False",
        CHECKPOINT,
        "content_that_is_not_right",
    ),
    "no bound on nesting": Mutant(
        "schema",
        "MAX_DEPTH = 32",
        "MAX_DEPTH = 10**9",
        CHECKPOINT,
        "content_that_is_not_right or holds_itself",
    ),
    "non-finite tensors saved": Mutant(
        "schema",
        'in ("model_state", "optimizer_state") and not _is_finite',
        'in ("optimizer_state",) and not _is_finite',
        CHECKPOINT,
        "not_finite_is_not_saved",
    ),
    "non-finite moments saved": Mutant(
        "schema",
        'in ("model_state", "optimizer_state") and not _is_finite',
        'in ("model_state",) and not _is_finite',
        CHECKPOINT,
        "not_finite_is_not_saved",
    ),
    "tensors among plain values": Mutant(
        "schema", "if _section(where) in PLAIN", "if False", CHECKPOINT, "not_right"
    ),
    "names after storages": Mutant(
        "schema",
        '    _check_names(clean["model_state"], shapes)\n    _check_storages(tensors)\n',
        '    _check_storages(tensors)\n    _check_names(clean["model_state"], shapes)\n',
        CHECKPOINT,
        "what_the_file_is",
    ),
    "types before what the file is": Mutant(
        "schema", "    _check_kind(payload)\n", "", CHECKPOINT, "what_the_file_is"
    ),
    "a list searched for each parameter": Mutant(
        "schema", "if i not in known or", "if i not in ids or", HOSTILE, "98"
    ),
    "NaN as best loss": Mutant("schema", "math.isnan(best) or", "", CHECKPOINT, "nan_never"),
    "shapes not checked": Mutant(
        "schema",
        "    if tuple(t.shape) != shape:",
        "    if False:",
        CHECKPOINT,
        "content_that_is_not_right",
    ),
    "untied weights allowed": Mutant(
        "schema",
        'if not _same(model_state["tok_emb.weight"], model_state["lm_head.weight"])',
        "if False",
        CHECKPOINT,
        "content_that_is_not_right",
    ),
    "strings not interned": Mutant(
        "schema",
        "return sys.intern(str(value))",
        "return str(value)",
        ROUND_TRIP,
        "not_on_the_objects",
    ),
    "keys in the order given": Mutant(
        "schema",
        "return sorted(value, key=lambda key: (type(key).__name__, key))",
        "return list(value)",
        ROUND_TRIP,
        "not_on_the_objects",
    ),
    "moments swapped": Mutant(
        "optim/__init__",
        "    fields = opt_state._asdict()",
        "    fields = dict(zip(opt_state._fields, reversed(opt_state)))",
        OPTIMIZERS,
        "entries_hold",
    ),
    "empty moments before step 1 omitted": Mutant(
        "optim/__init__",
        "    if not step:\n        return {}\n",
        "",
        OPTIMIZERS,
        "entries_hold",
    ),
    "the first good checkpoint taken as the newest": Mutant(
        "checkpoint",
        "if found is None or checkpoint.step > found.step:",
        "if found is None:",
        CHECKPOINT,
        "newest_good",
    ),
    "damaged checkpoints not skipped": Mutant(
        "checkpoint",
        "            skipped.append((path, str(error)))\n            continue",
        "            return None, [(path, str(error))]",
        CHECKPOINT,
        "newest_good",
    ),
    "only one name written": Mutant(
        "schema",
        "[Path(path) for path in paths]",
        "[Path(paths[0])]",
        CHECKPOINT,
        "several_names",
    ),
    "the model diff not checked": Mutant(
        "checkpoint",
        "        validate_model_config_match(self.cfg, model_cfg)\n",
        "",
        CHECKPOINT,
        "shows_the_diff",
    ),
    "batches counted from 0 after a resume": Mutant(
        "run/session",
        "batch=lambda step: corpus.batch(step, device)",
        "batch=lambda step: corpus.batch(step - plan.state.step, device)",
        TRAIN,
        "ends_in_the_same_bytes",
    ),
    "metrics not truncated on a resume": Mutant(
        "run/plan",
        "records = records_until(read_metrics(logged), resumed.step, resumed.scores.val_step)",
        "records = read_metrics(logged)",
        TRAIN,
        "ends_in_the_same_bytes",
    ),
    "a second signal of any kind ends at once": Mutant(
        "run/stop",
        "if signum == signal.SIGINT and time.monotonic() - self._since > PATIENCE:",
        "if True:",
        "tests/run/test_stop.py",
        "only_a_ctrl_c",
    ),
    "a resumed state taken for saved": Mutant(
        "run/loop",
        "    saved = False\n    try:",
        "    saved = state.step > 0\n    try:",
        "tests/run/test_loop.py",
        "stopped_before_its_first_save",
    ),
    "a best of another folder carried on": Mutant(
        "run/best",
        "    if resumed.path.parent.resolve() != folder.resolve():\n        return False",
        "    if resumed.path.parent.resolve() != folder.resolve():\n        return True",
        "tests/run/test_best.py",
        "in_another_folder",
    ),
    "a best of another validation text carried on": Mutant(
        "run/best",
        "    return a != b\n",
        "    return False\n",
        "tests/run/test_best.py",
        "changed_validation_text",
    ),
    "a damaged log not kept": Mutant(
        "run/metrics",
        "    if not damage_in(path):",
        "    if True:",
        "tests/run/test_metrics.py",
        "kept_when_it_is_replaced",
    ),
}


def copied(folder: Path) -> Path:
    """Copy the package and its tests into the folder."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("niels_gpt", "tests", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run_tests(folder: Path, tests: str, chosen: str) -> subprocess.CompletedProcess:
    options = ["-x", "-p", "no:cacheprovider", "--tb=no", "-rfE", "-k", chosen]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, tests],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_mutation_the_tests_pass(tmp_path):
    folder = copied(tmp_path)
    chosen: dict[str, set[str]] = {}
    for mutant in MUTANTS.values():
        chosen.setdefault(mutant.tests, set()).add(mutant.chosen)
    for tests, names in chosen.items():
        run = run_tests(folder, tests, " or ".join(sorted(names)))
        assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(tmp_path, name, record_property):
    mutant = MUTANTS[name]
    folder = copied(tmp_path)
    module = folder / "niels_gpt" / f"{mutant.module}.py"
    source = module.read_text()
    assert source.count(mutant.old) == 1, "the mutation no longer applies"
    module.write_text(source.replace(mutant.old, mutant.new))
    run = run_tests(folder, mutant.tests, mutant.chosen)
    assert run.returncode == 1, run.stdout[-3000:]
    killer = re.search(r"^(?:FAILED|ERROR) \S*?::(.*?)( - |$)", run.stdout, re.MULTILINE)
    assert killer
    record_property("killed by", killer[1])
    print(f"{name}: killed by {killer[1]}", flush=True)
