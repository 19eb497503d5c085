"""The shares of the sources as the user gives them with `--mix`, or leaves them to the program."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from niels_gpt.config import SOURCE_NAMES, ConfigDocument, TrainConfig, nearest
from niels_gpt.data.sources import SOURCES, Given

EXAMPLE = "text=0.9,primer=0.1"
LARGEST = 1e9


def parse_mix(text: str) -> dict[str, float]:
    """Parse shares such as "text=0.9,primer=0.1"; scale them to sum to 1.

    A source may also be called by its option (`notes` for roam).

    Raises:
        ValueError: for anything but known sources, each once, with shares of which none is negative
            and one is positive.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (word.strip() for word in part.partition("="))
        if not equals:
            raise ValueError(f"{part.strip()!r} is not NAME=SHARE, as in {EXAMPLE}")
        source = _source(name)
        if source in shares:
            raise ValueError(f"{name} is given twice")
        shares[source] = _share(name, number)
    total = math.fsum(shares.values())
    if not total > 0:
        raise ValueError("no share is positive")
    if math.isclose(total, 1):  # as `written` writes them: the same bits again
        return shares
    return {name: share / total for name, share in shares.items()}


def _source(name: str) -> str:
    names = {source.option: key for key, source in SOURCES.items() if source.option}
    names |= {key: key for key in SOURCE_NAMES}
    if name not in names:
        raise ValueError(f"unknown source {name!r} ({nearest(name, names)})")
    return names[name]


def _share(name: str, number: str) -> float:
    try:
        share = float(number)
    except ValueError:
        share = math.nan
    if not 0 <= share <= LARGEST:
        raise ValueError(f"{name}={number} is not a share: it must be a number from 0 to 1e9")
    return share


def written(mix: Mapping[str, float]) -> str:
    """Return shares in the form that `parse_mix` reads."""
    return ",".join(f"{name}={share!r}" for name, share in mix.items())


def with_mix(cfg: TrainConfig, given: Given) -> TrainConfig:
    """Return the config with the shares of `--mix`.

    Where the user named a text of which no share says anything, it shares equally with the other
    sources that were named: to train on one's own text takes no arithmetic.
    """
    places = given.places
    if given.mix:
        return replace(cfg, p_train=dict(given.mix))
    if "text" not in places or "text" in cfg.p_train:
        return cfg
    return replace(cfg, p_train={name: 1 / len(places) for name in places})


def may_choose_val(
    cfg: TrainConfig,
    given: Given,
    document: ConfigDocument | None,
    overrides: Iterable[str] = (),
) -> bool:
    """Return whether the program may choose the source that decides best.pt of a new run.

    It is the wiki text by default, which is not built for this alone: only where it has a share or
    a place, or the config file or an override sets `val_source`.
    """
    if "wiki" in given.places or cfg.p_train.get("wiki", 0) > 0:
        return False
    return document is None or not document.gives("train.val_source", overrides)
