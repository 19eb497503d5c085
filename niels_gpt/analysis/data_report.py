"""A report on the sources: what exists, how it is split, what was left out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from niels_gpt import paths, streams
from niels_gpt.data import cache
from niels_gpt.data.roam import other_files, scan_notes
from niels_gpt.streams import SourceInfo, StreamBuildConfig

CACHED, STALE, UNCACHED = "cached", "cached from other input", "not cached"


class LeftOut(NamedTuple):
    """A file or folder that is not read, or is altered when read, and why."""

    path: str
    reason: str


class Split(NamedTuple):
    """One of the two streams of a source."""

    nbytes: int
    sha256: str
    documents: int | None  # notes or dialogues; None if unknown
    cache: str  # `CACHED`, `STALE` or `UNCACHED`


class Source(NamedTuple):
    """The report on a source."""

    name: str
    problem: str | None  # why it cannot be used; most fields below are then empty
    origin: str
    place: str
    files: int | None  # number of files read; None if the text is not the user's
    splits: dict[str, Split]
    left_out: list[LeftOut]
    altered: list[LeftOut]  # read with replacements
    notes: list[str]


def survey(cfg: StreamBuildConfig) -> list[Source]:
    """Report on each enabled source; nothing is written or downloaded."""
    cfg = replace(cfg, write_cache=False, fetch=False, required_sources=(), wiki_fallback=True)
    return [_look(name, replace(cfg, enabled_sources=(name,))) for name in cfg.enabled_sources]


def _look(name: str, cfg: StreamBuildConfig) -> Source:
    notes, left_out, others = _look_among_notes(cfg) if name == "roam" else ([], [], [])
    try:
        train, val = streams.build_sources(cfg)
    except (ValueError, RuntimeError, OSError) as error:
        return Source(name, str(error), "", "", None, {}, left_out, [], [])
    if name not in train:
        problem = train.missing[name]
        return Source(name, problem, "", "", None, {}, left_out, [], train.messages + others)
    _, info, recipe = train.built[name]
    assert recipe is not None
    counts = recipe.documents() if recipe.documents else (None, None)
    splits = {
        split: _split(cfg, name, split, sources.built[name].info, documents)
        for split, sources, documents in zip(streams.SPLITS, (train, val), counts, strict=True)
        if name in sources
    }
    return Source(
        name=name,
        problem=None,
        origin=info.origin,
        place=info.place,
        files=len(recipe.inputs["files"]) if "files" in recipe.inputs else None,
        splits=splits,
        left_out=left_out,
        altered=altered(notes),
        notes=train.messages + others,
    )


def _look_among_notes(cfg: StreamBuildConfig) -> tuple[list[Path], list[LeftOut], list[str]]:
    """Return the notes, what is left out, and messages about files with other suffixes."""
    root = Path(streams.reading("roam", cfg).place)
    if not root.exists():
        return [], [], []
    notes, skipped = scan_notes(root)
    counts = other_files(root)
    kinds = ", ".join(f"{n} {suffix}" for suffix, n in counts.most_common(8))
    others = [f"roam: only *.md is read, not {kinds}"] if counts else []
    return notes, [LeftOut(str(s.path), s.reason) for s in skipped], others


def _split(
    cfg: StreamBuildConfig, name: str, split: str, info: SourceInfo, documents: int | None
) -> Split:
    state = cache_state(cfg, name, split, info.sha256)
    return Split(info.nbytes, info.sha256, documents, state)


def cache_state(cfg: StreamBuildConfig, name: str, split: str, sha256: str) -> str:
    """Return whether the cache holds the stream with this digest."""
    meta = cache.read_meta(paths.REPO_ROOT / cfg.cache_dir, f"{name}_{split}")
    if not meta:
        return UNCACHED
    return CACHED if meta.get("sha256") == sha256 else STALE


def altered(files: Sequence[Path]) -> list[LeftOut]:
    """List the files that are not valid UTF-8, whose invalid bytes are replaced."""
    found = []
    for path in files:
        data = path.read_bytes()
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            found.append(LeftOut(str(path), "UTF-16, but read as UTF-8: save it as UTF-8"))
        elif lost := _replaced(data):
            found.append(LeftOut(str(path), f"not UTF-8: {lost} characters were replaced"))
    return found


def _replaced(data: bytes) -> int:
    return data.decode(errors="replace").count("\ufffd") - data.count("\ufffd".encode())
