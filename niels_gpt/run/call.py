"""How a run was called: kept beside its checkpoints, because these must not contain paths.

A resume finds the text there, unless it is given another place.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from niels_gpt.config import ConfigDocument, TrainConfig, find_config
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


def recall(given: Given, before: Call) -> Given:
    """Return what is given of the text, and what the earlier call gave where this one is silent."""
    there = {name: _place(paths) for name, paths in before.places.items()}
    both = {**there, **given.places}
    places = {name: both[name] for name in SOURCES if name in both}  # in one order, however given
    return replace(given, places=places, mix=before.mix if given.mix is None else given.mix)


def gives_shares(options: TrainOptions, before: Call, document: ConfigDocument) -> bool:
    """Return whether shares are given anew: by `--mix`, `--set`, or another config than before."""
    is_other = _file_of(document.where) != _file_of(before.config)
    by_config = is_other and document.gives(SHARES)
    by_set = ConfigDocument("", {}).gives(SHARES, options.overrides)
    return by_config or by_set or options.given.mix is not None


def without_what_is_gone(given: Given, before: Call, needed: Collection[str]) -> Given:
    """Leave out the places of the earlier call that do not exist any more.

    Raises:
        FileNotFoundError: if one of a source that is needed does not.
    """
    lost = _lost(before)
    gone = [name for name in lost if given.places.get(name) == _place(before.places[name])]
    for name in gone:
        if name in needed:
            raise FileNotFoundError(f"{lost[name]}: give its place with {option_of(name)}")
    places = {name: place for name, place in given.places.items() if name not in gone}
    return replace(given, places=places)


def remembered(
    given: Given, files: Sequence[Path], wanted: Collection[str] = tuple(SOURCES)
) -> tuple[Given, list[str]]:
    """Return what is given of the text, else as the run was given it; and messages.

    Args:
        files: checkpoints of the run, or its folders; the first beside a call counts.
        wanted: the sources to look for.
    """
    folders = [path if path.is_dir() else path.parent for path in files]
    before, messages = read_call(next((f for f in folders if (f / CALL).exists()), folders[0]))
    wanted = [name for name in wanted if name in before.places and name not in given.places]
    lost = {name: line for name, line in _lost(before).items() if name in wanted}
    there = {name: _place(before.places[name]) for name in wanted if name not in lost}
    return replace(given, places={**there, **given.places}), [*messages, *lost.values()]


def _place(paths: list[str]) -> Place:
    return Path(paths[0]) if len(paths) == 1 else tuple(map(Path, paths))


def _lost(before: Call) -> dict[str, str]:
    """Return a line for each source of which a place does not exist any more."""
    return {
        name: f"{path}, where this run had its text ({name}), does not exist any more"
        for name, paths in before.places.items()
        for path in paths
        if not Path(path).exists()
    }


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


def _file_of(config: str | None) -> str | None:
    """Return the absolute path of a config, by path or by name; None if it is not there."""
    try:
        return None if config is None else str(find_config(config).resolve())
    except FileNotFoundError:
        return None


def _config_name(config: str | None) -> str | None:
    """Return a bare name as it is, the path of a file absolute."""
    if config is None:
        return None
    return str(Path(config).absolute()) if Path(config).is_file() else config
