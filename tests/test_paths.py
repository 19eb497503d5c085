"""Paths of a checkout, and of a package that is installed without one."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from niels_gpt import paths
from tests import ROOT

REPO = ROOT


def installed(tmp_path, **env):
    """Return the path attributes as a copy of the package outside any checkout sees them."""
    site = tmp_path / "site"
    package = site / "niels_gpt"
    (package / "data").mkdir(parents=True)
    shutil.copy(REPO / "niels_gpt" / "paths.py", package)
    (package / "__init__.py").write_text("")
    (package / "data" / "primer.txt").write_text("bundled")
    work = tmp_path / "work"
    work.mkdir()
    code = (
        "import json; from niels_gpt import paths as p\n"
        "found = {k: str(getattr(p, k)) for k in dir(p) if k.isupper()}\n"
        "print(json.dumps({**found, 'primer': str(p.primer_path())}))"
    )
    clean = {k: v for k, v in os.environ.items() if k != "NIELS_GPT_HOME"}
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=work,
        env={**clean, "PYTHONPATH": str(site), **env},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not list(work.iterdir()), "importing wrote something"
    return {name: Path(value) for name, value in json.loads(result.stdout).items()}


def test_a_checkout_is_its_own_root():
    found = runpy.run_path(paths.__file__)  # as it is imported
    assert found["REPO_ROOT"] == REPO
    assert found["ROAM_DIR"] == REPO / ".roam-data"
    assert found["PRIMER_PATH"] == found["primer_path"]() == REPO / "data" / "primer.txt"
    assert found["CHECKPOINT_DIR"] == REPO / "checkpoints"
    assert found["CONFIG_DIR"] == REPO / "configs"


def test_installed_the_current_folder_is_the_root(tmp_path):
    found = installed(tmp_path)
    assert found["REPO_ROOT"] == tmp_path / "work"
    assert found["CHECKPOINT_DIR"] == tmp_path / "work" / "checkpoints"
    assert found["primer"] == tmp_path / "site" / "niels_gpt" / "data" / "primer.txt"


def test_installed_the_home_variable_is_the_root(tmp_path):
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (home / "data" / "primer.txt").write_text("own")
    found = installed(tmp_path, NIELS_GPT_HOME=str(home))
    assert found["REPO_ROOT"] == home
    assert found["primer"] == home / "data" / "primer.txt"


@pytest.mark.parametrize(
    ("value", "root"),
    [
        ("", "work"),
        ("sub", "work/sub"),
        ("~/deep", "user/deep"),
        ("~no-such-user/x", "work/~no-such-user/x"),
    ],
)
def test_installed_the_root_is_absolute(tmp_path, value, root):
    found = installed(tmp_path, NIELS_GPT_HOME=value, HOME=str(tmp_path / "user"))
    assert found["REPO_ROOT"] == tmp_path / root


def test_a_checkout_ignores_the_home_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("NIELS_GPT_HOME", str(tmp_path))
    assert paths._find_root(REPO / "niels_gpt") == REPO


def test_ensure_dirs_creates_two_folders_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "CHECKPOINT_DIR", tmp_path / "a" / "checkpoints")
    monkeypatch.setattr(paths, "CONFIG_DIR", tmp_path / "configs")
    paths.ensure_dirs()
    paths.ensure_dirs()
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert made == {"a", "a/checkpoints", "configs"}


def test_without_any_primer_the_root_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "PACKAGE_DIR", tmp_path)
    monkeypatch.setattr(paths, "PRIMER_PATH", tmp_path / "none.txt")
    assert paths.primer_path() == tmp_path / "none.txt"


def test_a_project_that_merely_has_a_pyproject_is_no_checkout(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setenv("NIELS_GPT_HOME", str(tmp_path / "home"))
    assert paths._find_root(tmp_path / "niels_gpt") == tmp_path / "home"
