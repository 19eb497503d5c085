"""How a run was called: kept beside its checkpoints, because these must not contain paths.

A resume finds the text there, unless it is given another place.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from niels_gpt.config import TrainConfig
from niels_gpt.data.sources import SOURCES, Given, Place, all_places, option_of
from niels_gpt.files import durable
from niels_gpt.files.names import CALL
from niels_gpt.files.strict_json import load_json
from niels_gpt.run.options import TrainOptions

SHARES = "train.p_train"


@dataclass(frozen=True)
class Call:
    """What a run was given that its checkpoints do not hold."""

    config: str | None = None  # the name or the absolute path of the config file
    places: dict[str, list[str]] = field(default_factory=dict)  # source -> absolute paths
    mix: dict[str, float] | None = None  # share of each source, where the user gave shares

    def write(self, folder: Path) -> None:
        """Write it durably beside the checkpoints of a folder."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True)  # ASCII, whatever the names
        durable.write_durably([folder / CALL], f"{text}\n".encode())


def call_of(options: TrainOptions, before: Call) -> Call:
    """Return how a run is called now; `before` is the call of the run that it continues."""
    given = options.given
    return Call(
        _config_name(options.config) or before.config,
        {
            name: [str(Path(path).absolute()) for path in all_places(place)]
            for name, place in given.places.items()
        },
        None if given.mix is None else dict(given.mix),
    )


def recall(options: TrainOptions, before: Call) -> Given:
    """Return what is given of the text, and what the earlier call gave where this one is silent.

    With shares that are given anew, of which a source has none, its place is not needed.

    Raises:
        FileNotFoundError: if a place of the earlier call does not exist any more.
    """
    given, places = options.given, {}
    for name in SOURCES:
        if name in given.places:
            places[name] = given.places[name]
        elif name in before.places and (given.mix is None or given.mix.get(name)):
            places[name] = _still_there(name, before.places[name])
    shares_set = any(override.strip().startswith(SHARES) for override in options.overrides)
    mix = before.mix if given.mix is None and not shares_set else given.mix
    return replace(given, places=places, mix=mix)


def remembered(given: Given, checkpoint: Path) -> Given:
    """Return what is given of the text, or else the places of a checkpoint's run that still exist.

    Args:
        checkpoint: a file of the run, or its folder.
    """
    if given.places:
        return given
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    there = {
        name: _place(paths)
        for name, paths in read_call(folder)[0].places.items()
        if all(Path(path).exists() for path in paths)
    }
    return replace(given, places=there)


def _place(paths: list[str]) -> Place:
    return Path(paths[0]) if len(paths) == 1 else tuple(map(Path, paths))


def _still_there(name: str, paths: list[str]) -> Place:
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(
                f"{path}, from where this run had its {name} text, does not exist any"
                f" more: give its place with {option_of(name)}"
            )
    return _place(paths)


def read_call(folder: Path) -> tuple[Call, list[str]]:
    """Return the call of the run in a folder, empty if it is not known, and messages."""
    try:
        return _parsed(load_json(folder / CALL)), []
    except FileNotFoundError:
        return Call(), []
    except (OSError, ValueError) as error:
        return Call(), [f"{error}: the places of the text are the default ones"]


def _parsed(found: Any) -> Call:
    """Return what a file holds; of a value that is not what this program writes, nothing."""
    doc = found if isinstance(found, dict) else {}
    config, places, mix = doc.get("config"), doc.get("places"), doc.get("mix")
    kept = places.items() if isinstance(places, dict) else ()
    return Call(
        config if isinstance(config, str) else None,
        {name: paths for name, paths in kept if name in SOURCES and _are_paths(paths)},
        mix if _are_shares(mix) else None,
    )


def _are_paths(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(p, str) for p in value)


def _are_shares(value: object) -> bool:
    try:
        shares = TrainConfig(p_train=value).p_train if isinstance(value, dict) else {}
    except ValueError:
        return False
    return bool(shares) and shares.keys() <= SOURCES.keys()


def _config_name(config: str | None) -> str | None:
    """Return a bare name as it is, the path of a file absolute."""
    if config is None:
        return None
    return str(Path(config).absolute()) if Path(config).is_file() else config
