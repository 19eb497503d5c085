"""The two configs of a run as frozen, validated values, and the JSON documents they are read from.

Standard library only, so that a bad config is reported before torch is imported.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from niels_gpt import paths
from niels_gpt.data.sources import SOURCES
from niels_gpt.files.strict_json import MAX_LISTED, parse_json, shorten, show
from niels_gpt.files.strict_json import load_json as load_json
from niels_gpt.files.strict_json import save_json as save_json

SOURCE_NAMES = tuple(SOURCES)
OPTIMIZERS = ("adamw", "muon")  # each a module of niels_gpt.optim
INITS = ("normal", "fan_in")
LR_DECAYS = ("cosine", "linear")  # as niels_gpt.lr_schedule defines them
MAX_CONFIG_BYTES = 1_000_000
LARGEST_FLOAT = 1e30  # float32 holds it with room for one multiplication


class Problems(ValueError):
    """An error of several lines, kept apart because a file name in one may hold a newline."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n  ".join(lines))
        self.lines = lines


def default_p_train() -> dict[str, float]:
    """Return the share of each source in training: primer 2 %, the rest wiki:roam = 80:20."""
    return {"wiki": 0.784, "roam": 0.196, "primer": 0.020}


def _bounds(
    low: float, high: float, meaning: str, *, open_low: bool = False, open_high: bool = False
) -> dict[str, Any]:
    """Return dataclass field metadata: the valid range and the meaning of a value."""
    return {
        "low": low,
        "high": high,
        "open_low": open_low,
        "open_high": open_high,
        "meaning": meaning,
    }


def _one_of(names: tuple[str, ...], meaning: str) -> dict[str, Any]:
    """Return dataclass field metadata: the valid names and the meaning of a value."""
    return {"names": names, "meaning": meaning}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT. Raises one ValueError that lists every invalid value."""

    V: int = field(default=256, metadata=_bounds(1, 65_536, "vocabulary, byte values"))
    T: int = field(default=256, metadata=_bounds(1, 1_048_576, "context length, bytes"))
    C: int = field(default=256, metadata=_bounds(2, 65_536, "width of the residual stream"))
    L: int = field(default=4, metadata=_bounds(1, 1_024, "number of blocks"))
    H: int = field(default=4, metadata=_bounds(1, 1_024, "attention heads; C/H must be even"))
    d_ff: int = field(default=1024, metadata=_bounds(1, 1_048_576, "width inside the MLP"))
    dropout: float = field(
        default=0.1, metadata=_bounds(0, 1, "probability of dropping an activation", open_high=True)
    )
    rope_theta: float = field(
        default=10000.0, metadata=_bounds(1e-6, 1e12, "base of the rotary frequencies")
    )

    def __post_init__(self) -> None:
        _adopt(self, _field_problems(ModelConfig, vars(self)))


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run. Raises one ValueError that lists every invalid value.

    `p_train` is copied; None means `default_p_train()`. It makes the config unhashable.
    """

    seed: int = field(default=42, metadata=_bounds(0, 2**63 - 1, "key of every random draw"))
    B: int = field(default=32, metadata=_bounds(1, 1_048_576, "rows per batch"))
    total_steps: int = field(default=20000, metadata=_bounds(1, 10**9, "updates in the run"))
    eval_every: int = field(default=200, metadata=_bounds(1, 10**9, "updates between evaluations"))
    eval_steps: int = field(default=100, metadata=_bounds(1, 10**9, "batches per evaluation"))
    log_every: int = field(default=50, metadata=_bounds(1, 10**9, "updates between log lines"))
    ckpt_every: int = field(
        default=1000, metadata=_bounds(1, 10**9, "updates between step_*.pt files")
    )
    base_lr: float = field(
        default=3e-4, metadata=_bounds(0, LARGEST_FLOAT, "learning rate after warmup")
    )
    warmup_steps: int = field(default=200, metadata=_bounds(0, 10**9, "updates of linear warmup"))
    min_lr: float = field(
        default=3e-5, metadata=_bounds(0, LARGEST_FLOAT, "learning rate of the last update")
    )
    lr_decay: str = field(
        default="cosine",
        metadata=_one_of(LR_DECAYS, "from base_lr to min_lr: cosine, or linear"),
    )
    grad_clip: float = field(
        default=1.0,
        metadata=_bounds(0, LARGEST_FLOAT, "maximum global norm of the gradient", open_low=True),
    )
    weight_decay: float = field(
        default=0.1, metadata=_bounds(0, LARGEST_FLOAT, "decoupled weight decay")
    )
    optimizer: str = field(
        default="adamw", metadata=_one_of(OPTIMIZERS, "update rule: adamw, or muon in the blocks")
    )
    init: str = field(
        default="normal", metadata=_one_of(INITS, "first weights: normal (0.02), or fan_in")
    )
    val_source: str = field(
        default="wiki",
        metadata=_one_of(SOURCE_NAMES, "source whose validation text decides best.pt"),
    )
    p_train: dict[str, float] = field(
        default_factory=default_p_train,
        metadata={"meaning": "probability of each source, summing to 1"},
    )

    def __post_init__(self) -> None:
        if self.p_train is None:
            object.__setattr__(self, "p_train", default_p_train())
        _adopt(self, _field_problems(TrainConfig, vars(self)))
        object.__setattr__(self, "p_train", {k: float(v) for k, v in self.p_train.items()})


SECTIONS: dict[str, type[ModelConfig] | type[TrainConfig]] = {
    "model": ModelConfig,
    "train": TrainConfig,
}


# --- checking values ---------------------------------------------------------------------------


def _adopt(config: ModelConfig | TrainConfig, problems: list[str]) -> None:
    """Raise if there are problems; else convert each number to its field's type."""
    if problems:
        raise ValueError(f"{type(config).__name__}: " + "; ".join(problems))
    for f in fields(config):
        if f.type in (int, float):
            object.__setattr__(config, f.name, f.type(getattr(config, f.name)))


def _field_problems(
    cls: type[ModelConfig] | type[TrainConfig], values: Mapping[str, object], prefix: str = ""
) -> list[str]:
    """Return one line per invalid value; relations are checked between valid values only."""
    problems = []
    legal: dict[str, Any] = {}
    for f in fields(cls):
        value = values[f.name]
        if problem := _problem(f, value):
            problems.append(f"{prefix}{f.name}={show(value)} {problem}")
        else:
            legal[f.name] = value
    return problems + [prefix + line for line in _relation_problems(legal)]


def _problem(f: dataclasses.Field[Any], value: object) -> str | None:
    if f.name == "p_train":
        return _p_train_problem(value)
    if "names" in f.metadata:
        return _name_problem(value, f.metadata["names"])
    return _number_problem(value, whole=f.type is int, bounds=f.metadata)


def _name_problem(value: object, names: tuple[str, ...]) -> str | None:
    if isinstance(value, str):
        return None if value in names else f"must be a known name ({nearest(value, names)})"
    return f"must be a name (known: {', '.join(names)})"


def _number_problem(value: object, *, whole: bool, bounds: Mapping[str, Any]) -> str | None:
    low, high = bounds["low"], bounds["high"]
    if (
        isinstance(value, int if whole else (int, float))
        and not isinstance(value, bool)
        and (low < value if bounds["open_low"] else low <= value)
        and (value < high if bounds["open_high"] else value <= high)
    ):
        return None
    kind = "an integer" if whole else "a number"
    left, right = "(" if bounds["open_low"] else "[", ")" if bounds["open_high"] else "]"
    return f"must be {kind} in {left}{low}, {high}{right}"


def _p_train_problem(value: object) -> str | None:
    if not isinstance(value, Mapping) or not value:
        return "must be an object of source names and probabilities"
    names = [show(name) for name in value if not (isinstance(name, str) and name)]
    if names:
        return f"has keys that are not source names: {', '.join(names)}"
    bounds = _bounds(0, 1, "")
    wrong = [
        f"{name}={show(p)}"
        for name, p in value.items()
        if _number_problem(p, whole=False, bounds=bounds)
    ]
    if wrong:
        return f"has values that are not probabilities from 0 to 1: {', '.join(wrong)}"
    total = math.fsum(value.values())
    if abs(total - 1) > 1e-6:
        return f"sums to {total:.9g}, must sum to 1"
    return None


def _relation_problems(legal: Mapping[str, Any]) -> list[str]:
    problems = []
    if "C" in legal and "H" in legal:
        C, H = legal["C"], legal["H"]
        if C % H:
            problems.append(f"H={H} does not divide C={C}")
        elif C // H % 2:
            problems.append(f"C={C} over H={H} gives the odd head width {C // H}; it must be even")
    if "min_lr" in legal and "base_lr" in legal and legal["min_lr"] > legal["base_lr"]:
        problems.append(f"min_lr={legal['min_lr']} is above base_lr={legal['base_lr']}")
    return problems


def to_dict(obj: Any) -> dict[str, Any]:
    """Return a dataclass as nested plain dicts, deeply copied."""
    return dataclasses.asdict(obj)


def dotted(doc: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return each value of nested dicts by its dotted path, such as "train.p_train.wiki"."""
    flat: dict[str, Any] = {}
    for key, value in doc.items():
        if isinstance(value, Mapping):
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# --- config documents --------------------------------------------------------------------------


class ConfigDocument(NamedTuple):
    """The content of a config file, which may be a pipe: read it once."""

    where: str  # the file; starts the error messages
    doc: Any

    def configs(
        self, overrides: Iterable[str] = (), *, model: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[ModelConfig, TrainConfig]:
        """Return the configs; missing keys take their defaults.

        Args:
            overrides: `--set` arguments such as `train.B=8`.
            model: values for the keys that the file's model section lacks.

        Raises:
            ValueError: listing every problem.
        """
        doc, where, overrides = self.doc, self.where, tuple(overrides)
        if model:
            sections = _require_sections(doc, where=where)
            doc = {**sections, "model": {**model, **sections.get("model", {})}}
        if overrides:
            doc = apply_overrides(doc, overrides, where=where)
            where += " with " + " ".join(f"--set {shorten(override)}" for override in overrides)
        return config_from_dict(doc, where=where, from_file=True)

    def gives(self, key: str, overrides: Iterable[str] = ()) -> bool:
        """Return whether the file or an override sets a value, such as "train.val_source"."""
        given = [*dotted(self.doc), *(override.partition("=")[0].strip() for override in overrides)]
        return any(name == key or name.startswith(f"{key}.") for name in given)


def read_config(name: str | os.PathLike[str]) -> ConfigDocument:
    """Read a config file, or one that is known by name (see `find_config`).

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not JSON.
    """
    path = find_config(name)
    return ConfigDocument(str(path), load_json(path, max_bytes=MAX_CONFIG_BYTES))


def load_config_from_json(
    path: str | os.PathLike[str], overrides: Iterable[str] = ()
) -> tuple[ModelConfig, TrainConfig]:
    """Read `{"model": {...}, "train": {...}}` with `--set` overrides; see `ConfigDocument.configs`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: listing every problem.
    """
    doc = load_json(path, max_bytes=MAX_CONFIG_BYTES)
    return ConfigDocument(str(path), doc).configs(overrides)


def config_from_dict(
    doc: object, *, where: str, from_file: bool = False
) -> tuple[ModelConfig, TrainConfig]:
    """Validate a config document and build both configs; `where` starts the error message.

    A config `from_file` must also suit text from files: its vocabulary must hold every byte, and
    `p_train` may name only known sources.
    """
    sections = _require_sections(doc, where=where)
    problems = _key_problems(sections)
    for name, cls in SECTIONS.items():
        values = vars(cls())
        given = {key: value for key, value in sections.get(name, {}).items() if key in values}
        if given.get("p_train", ...) is None:
            del given["p_train"]
        problems += _field_problems(cls, {**values, **given}, prefix=f"{name}.")
    _raise_problems(where, problems + (_data_problems(sections) if from_file else []))
    return (
        replace(ModelConfig(), **sections.get("model", {})),
        replace(TrainConfig(), **sections.get("train", {})),
    )


def apply_overrides(
    doc: object, overrides: Iterable[str], *, where: str = "config"
) -> dict[str, Any]:
    """Return a new document with `section.key=VALUE` set for each override, the last one winning.

    VALUE is JSON, or a bare word for a key whose value is a name. `train.p_train.wiki=0.5` sets one
    probability and keeps the others. `where` names `doc` in error messages.

    Raises:
        ValueError: for an unknown key or a VALUE that is not JSON. Whether the value is valid is
            checked by `config_from_dict`.
    """
    new_doc: dict[str, Any] = deepcopy(_require_sections(doc, where=where))
    for override in overrides:
        section, key, source, value = _parse_override(override)
        values = new_doc.setdefault(section, {})
        if source is None:
            values[key] = value
            continue
        p_train = values.get(key)
        if p_train is None:
            p_train = default_p_train()
        if not isinstance(p_train, dict):
            raise ValueError(f"{where}: train.p_train={show(p_train)} must be an object")
        values[key] = {**p_train, source: value}
    return new_doc


def _parse_override(override: str) -> tuple[str, str, str | None, Any]:
    """Split `train.p_train.wiki=0.5` into section, key, source (or None) and value."""
    where = f"--set {shorten(override)}"
    dotted, equals, text = override.partition("=")
    section, _, rest = dotted.strip().partition(".")
    key, dot, source = rest.partition(".")
    if not equals or not key or (dot and (section, key) != ("train", "p_train")):
        hint = _meant(section) if equals and not key else ""
        example = hint or "such as train.total_steps=20"
        raise ValueError(f"{where}: must be SECTION.KEY=VALUE, {example}")
    _raise_problems(where, _key_problems({section: {key: None}}))
    try:
        value = parse_json(text)
    except ValueError as error:
        if not _takes_a_name(section, key) or not text.strip():
            raise ValueError(f"{where}: the value is not JSON: {error}") from None
        value = text.strip()
    _raise_problems(where, _data_problems({section: {key: {source: value} if dot else value}}))
    return section, key, source if dot else None, value


def _meant(key: str) -> str:
    """Return a question about the key that is meant by one without its section, "" for none."""
    keys = {f.name: f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in fields(cls)}
    near = difflib.get_close_matches(key[:80], keys, n=1)
    return f"did you mean {keys[near[0]]}?" if near else ""


def _takes_a_name(section: str, key: str) -> bool:
    return any(f.name == key and "names" in f.metadata for f in fields(SECTIONS[section]))


def find_config(name: str | os.PathLike[str]) -> Path:
    """Return the config file: as given, else a bare name in CONFIG_DIR, else in the package.

    A bare name may omit `.json`.

    Raises:
        FileNotFoundError: listing the configs known by name.
    """
    given = Path(name)
    if os.path.exists(given) and not os.path.isdir(given):
        return given
    if len(given.parts) == 1:
        for folder in _config_folders():
            for candidate in (folder / given, folder / f"{given}.json"):
                if os.path.isfile(candidate):
                    return candidate
    known = known_configs()
    what = "is a folder, not a config file" if os.path.isdir(given) else "no such config file"
    raise FileNotFoundError(f"{name}: {what}; known by name: {', '.join(known) or 'none'}")


def known_configs() -> list[str]:
    """Return the names of the configs that are found by name."""
    return sorted({file.stem for folder in _config_folders() for file in folder.glob("*.json")})


def _config_folders() -> tuple[Path, Path]:
    return paths.CONFIG_DIR, paths.PACKAGE_DIR / "configs"


def _require_sections(doc: object, *, where: str) -> dict[str, dict[str, Any]]:
    if not isinstance(doc, dict):
        raise ValueError(
            f'{where}: must be an object with the sections "model" and "train", not {show(doc)}'
        )
    wrong = [
        f"{name}={show(doc[name])} must be an object"
        for name in SECTIONS
        if not isinstance(doc.get(name, {}), dict)
    ]
    _raise_problems(where, wrong)
    return doc


def _key_problems(doc: Mapping[str, Any]) -> list[str]:
    """Return one line per unknown section and key."""
    problems = _unknown("section", "", doc, SECTIONS)
    for name, cls in SECTIONS.items():
        known = [f.name for f in fields(cls)]
        problems += _unknown("key", f"{name}.", doc.get(name, {}), known)
    return problems


def _data_problems(doc: Mapping[str, Any]) -> list[str]:
    """Return what does not suit byte streams built from files."""
    V, p_train = doc.get("model", {}).get("V"), doc.get("train", {}).get("p_train")
    problems = []
    if isinstance(V, int) and not isinstance(V, bool) and 1 <= V < 256:
        problems.append(f"model.V={V} must be at least 256, to hold every byte")
    if isinstance(p_train, dict):
        problems += _unknown("source", "train.p_train.", p_train, SOURCE_NAMES)
    return problems


def _unknown(kind: str, prefix: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return a line with the closest known name for each unknown one of `names`."""
    unknown = [str(name) for name in names if name not in known]
    lines = []
    for name in unknown[:MAX_LISTED]:
        hint = nearest(name, known, prefix)
        shown = name if name.isidentifier() and name.isascii() and len(name) <= 80 else show(name)
        lines.append(f"unknown {kind} {prefix}{shown} ({hint})")
    return lines + ([f"and {len(unknown) - len(lines)} more"] if len(unknown) > len(lines) else [])


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return the closest known name as a question, or all of them if none is close."""
    by_lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name[:80].lower(), by_lower, n=1)
    if near:
        return f"did you mean {prefix}{by_lower[near[0]]}?"
    return f"known: {', '.join(by_lower.values())}"


def _raise_problems(where: str, problems: list[str]) -> None:
    if len(problems) == 1:
        raise ValueError(f"{where}: {problems[0]}")
    if problems:
        raise Problems(f"{where}:", *problems)
