"""Look at the sources without training: what there is, how it is split, what was left out."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from niels_gpt import paths, streams
from niels_gpt.data import cache
from niels_gpt.data.roam import other_files, scan_notes, split_roam_paths
from niels_gpt.streams import SourceInfo, StreamBuildConfig

CACHED, STALE, UNCACHED = "cached", "cached from other input", "not cached"


class LeftOut(NamedTuple):
    """A file or folder that is not read, or not read as it is, and why."""

    path: str
    reason: str


class Split(NamedTuple):
    """One of the two streams of a source."""

    nbytes: int
    sha256: str
    documents: int | None  # notes or dialogues; None where that is not known
    cache: str  # `CACHED`, `STALE` or `UNCACHED`


class Source(NamedTuple):
    """What there is to know of a source."""

    name: str
    problem: str | None  # why it cannot be used; the fields below but `left_out` are then empty
    origin: str
    place: str
    files: int | None  # that it is read from; None where there are none of the user's
    splits: dict[str, Split]
    left_out: list[LeftOut]
    altered: list[LeftOut]  # read, but not as they are
    notes: list[str]


def survey(cfg: StreamBuildConfig) -> list[Source]:
    """Look at each enabled source by itself; nothing is written and nothing is fetched."""
    cfg = replace(cfg, write_cache=False, fetch=False, required_sources=(), wiki_fallback=True)
    return [_look(name, replace(cfg, enabled_sources=(name,))) for name in cfg.enabled_sources]


def _look(name: str, cfg: StreamBuildConfig) -> Source:
    found, skipped = _notes_of(name, cfg)
    left_out = [LeftOut(str(s.path), s.reason) for s in skipped]
    others = _others(cfg) if name == "roam" else []
    try:
        train, val = streams.build_sources(cfg)
    except (ValueError, RuntimeError, OSError) as error:
        return Source(name, str(error), "", "", None, {}, left_out, [], [])
    if name not in train:
        problem = train.missing[name]
        return Source(name, problem, "", "", None, {}, left_out, [], train.messages + others)
    documents = _documents(name, cfg, found, {"train": train, "val": val})
    splits = {
        split: _split(cfg, name, split, streams.describe_sources(sources)[name], documents)
        for split, sources in (("train", train), ("val", val))
        if name in sources
    }
    info = streams.describe_sources(train)[name]
    return Source(
        name=name,
        problem=None,
        origin=info.origin,
        place=info.place,
        files=_file_count(info.origin, found),
        splits=splits,
        left_out=left_out,
        altered=altered(found),
        notes=train.messages + others,
    )


def _split(
    cfg: StreamBuildConfig, name: str, split: str, info: SourceInfo, documents: dict[str, int]
) -> Split:
    state = cache_state(cfg, name, split, info.sha256)
    return Split(info.nbytes, info.sha256, documents.get(split), state)


def cache_state(cfg: StreamBuildConfig, name: str, split: str, sha256: str) -> str:
    """Say whether the cache holds the stream with this digest."""
    meta = cache.read_meta(paths.REPO_ROOT / cfg.cache_dir, f"{name}_{split}")
    if not meta:
        return UNCACHED
    return CACHED if meta.get("sha256") == sha256 else STALE


def altered(files: Sequence[Path]) -> list[LeftOut]:
    """List the files that are not UTF-8: their bytes are replaced where they are not."""
    found = []
    for path in files:
        data = path.read_bytes()
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            found.append(LeftOut(str(path), "UTF-16, read as if it were UTF-8: save it as UTF-8"))
        elif lost := _replaced(data):
            found.append(LeftOut(str(path), f"not UTF-8: {lost} characters were replaced"))
    return found


def _replaced(data: bytes) -> int:
    return data.decode(errors="replace").count("\ufffd") - data.count("\ufffd".encode())


def _notes_of(name: str, cfg: StreamBuildConfig) -> tuple[list[Path], list[Any]]:
    return (
        scan_notes(cfg.roam_root) if name == "roam" and Path(cfg.roam_root).exists() else ([], [])
    )


def _others(cfg: StreamBuildConfig) -> list[str]:
    """Say what else lies among the notes, so that nobody misses a text of another suffix."""
    counts = other_files(cfg.roam_root)
    kinds = ", ".join(f"{n} {suffix}" for suffix, n in counts.most_common(8))
    return [f"roam: only *.md is read, not {kinds}"] if counts else []


def _documents(
    name: str, cfg: StreamBuildConfig, found: list[Path], sources: dict[str, streams.Sources]
) -> dict[str, int]:
    """Count the notes or dialogues of each split."""
    if name == "roam":
        root = Path(os.path.abspath(cfg.roam_root))
        sides = split_roam_paths(found, val_frac=cfg.roam_val_frac, seed=cfg.seed, root=root)
        return dict(zip(streams.SPLITS, map(len, sides), strict=True))
    if name == "primer":
        mark = cfg.delimiter.encode()
        return {split: s[name].count(mark) + 1 for split, s in sources.items() if name in s}
    return {}


def _file_count(origin: str, found: list[Path]) -> int | None:
    return {"notes": len(found), "folder": 2, "primer": 1}.get(origin)
