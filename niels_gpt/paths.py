"""Default locations. Read them as attributes of the module, so that tests can replace them."""

import os
from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent


def _find_root(package_dir: Path) -> Path:
    """Return the checkout that contains the package, else $NIELS_GPT_HOME or the current folder.

    A wheel's parent folder (site-packages) has no pyproject.toml and no configs folder.
    """
    parent = package_dir.parent
    if (parent / "pyproject.toml").is_file() and (parent / "configs").is_dir():
        return parent
    return Path(os.path.expanduser(os.environ.get("NIELS_GPT_HOME") or os.curdir)).absolute()


REPO_ROOT = _find_root(PACKAGE_DIR)
ROAM_DIR = REPO_ROOT / ".roam-data"
PRIMER_PATH = REPO_ROOT / "data" / "primer.txt"
CHECKPOINT_DIR = REPO_ROOT / "checkpoints"
CONFIG_DIR = REPO_ROOT / "configs"


def ensure_dirs() -> None:
    """Create the checkpoint and config folders if they are missing."""
    CHECKPOINT_DIR.mkdir(parents=True, exist_ok=True)
    CONFIG_DIR.mkdir(parents=True, exist_ok=True)


def primer_path() -> Path:
    """Return PRIMER_PATH, or the copy inside an installed wheel if that file does not exist."""
    bundled = PACKAGE_DIR / "data" / "primer.txt"
    return bundled if bundled.is_file() and not PRIMER_PATH.exists() else PRIMER_PATH
