"""How a run was called: kept beside its checkpoints, because these must not contain paths.

A resume finds the text there, unless it is given another place.
"""

import copy
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from niels_gpt.data.sources import SOURCES, all_places, option_of
from niels_gpt.files import durable
from niels_gpt.files.names import CALL
from niels_gpt.files.strict_json import load_json
from niels_gpt.run.options import TrainOptions


@dataclass(frozen=True)
class Call:
    """What a run was given that its checkpoints do not hold."""

    config: str | None = None  # the name or the absolute path of the config file
    places: dict[str, list[str]] = field(default_factory=dict)  # source -> absolute paths

    def write(self, folder: Path) -> None:
        """Write it durably beside the checkpoints of a folder."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True)  # ASCII, whatever the names
        durable.write_durably([folder / CALL], f"{text}\n".encode())


def call_of(options: TrainOptions, before: Call) -> Call:
    """Return how a run is called now; `before` is the call of the run that it continues."""
    return Call(
        _config_name(options.config) or before.config,
        {
            name: [str(Path(path).absolute()) for path in all_places(place)]
            for name, place in options.places.items()
        },
    )


def recall(options: TrainOptions, before: Call) -> TrainOptions:
    """Return the options with the places of the earlier call where no others are given.

    Raises:
        FileNotFoundError: if such a place does not exist any more.
    """
    places: Any = copy.copy(options.places)
    for name, paths in before.places.items():
        if name not in places:
            for path in paths:
                if not Path(path).exists():
                    raise FileNotFoundError(
                        f"{path}, from where this run had its {name} text, does not exist any"
                        f" more: give its place with {option_of(name)}"
                    )
            places[name] = Path(paths[0]) if len(paths) == 1 else tuple(map(Path, paths))
    return replace(options, places=places)


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
    config, places = doc.get("config"), doc.get("places")
    kept = places.items() if isinstance(places, dict) else ()
    return Call(
        config if isinstance(config, str) else None,
        {name: paths for name, paths in kept if name in SOURCES and _are_paths(paths)},
    )


def _are_paths(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(p, str) for p in value)


def _config_name(config: str | None) -> str | None:
    """Return a bare name as it is, the path of a file absolute."""
    if config is None:
        return None
    return str(Path(config).absolute()) if Path(config).is_file() else config
