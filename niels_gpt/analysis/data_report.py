"""A report on the sources: what exists, how it is split, what was left out."""

import os
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from niels_gpt import paths, streams
from niels_gpt.data import cache
from niels_gpt.data.recipe import Remark
from niels_gpt.data.roam import TEXT_SUFFIXES, scan_folder, tell_suffixes
from niels_gpt.streams import Built, StreamBuildConfig

CACHED, STALE, UNCACHED = "cached", "the cache will be rebuilt", "not cached"


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
    left_out: list[Remark]
    altered: list[Remark]  # not plain UTF-8
    messages: list[str]


def survey(cfg: StreamBuildConfig) -> list[Source]:
    """Report on each enabled source; nothing is written or downloaded."""
    cfg = replace(cfg, write_cache=False, fetch=False, required_sources=(), wiki_fallback=True)
    return [_look(name, replace(cfg, enabled_sources=(name,))) for name in cfg.enabled_sources]


def _look(name: str, cfg: StreamBuildConfig) -> Source:
    left_out, others = _look_among_notes(cfg) if name == "roam" else ([], [])
    try:
        train, val = streams.build_sources(cfg)
    except (ValueError, RuntimeError, OSError) as error:
        return Source(name, str(error), "", "", None, {}, left_out, [], others)
    if name not in train:
        problem = train.missing[name]
        return Source(name, problem, "", "", None, {}, left_out, [], train.messages + others)
    _, info, recipe, report, unread = train.built[name]
    assert recipe is not None
    skipped = streams.remarks(report, "skipped")
    read = None
    if "files" in recipe.inputs:
        read = len(recipe.inputs["files"]) - len(unread) - len(skipped)
    splits = {
        split: _split(cfg, name, split, sources.built[name])
        for split, sources in zip(streams.SPLITS, (train, val), strict=True)
        if name in sources
    }
    return Source(
        name=name,
        problem=None,
        origin=info.origin,
        place=info.place,
        files=read,
        splits=splits,
        left_out=[*left_out, *recipe.left_out, *unread, *skipped],
        altered=streams.remarks(report, "altered"),
        messages=train.messages + others,
    )


def _look_among_notes(cfg: StreamBuildConfig) -> tuple[list[Remark], list[str]]:
    """Return what is left out, and messages about files with other suffixes."""
    root = streams.reading("roam", cfg).place
    if not str(root) or not os.path.lexists(root):
        return [], []
    scan = scan_folder(root)
    others = Counter({s: n for s, n in scan.others.items() if s not in TEXT_SUFFIXES})
    messages = [f"roam: {message}" for message in tell_suffixes("other", others)]
    return [Remark(str(s.path), s.reason) for s in scan.skipped], messages


def _split(cfg: StreamBuildConfig, name: str, split: str, built: Built) -> Split:
    info = built.info
    state = cache_state(cfg, name, split, info.sha256)
    return Split(info.nbytes, info.sha256, built.report.get("documents"), state)


def cache_state(cfg: StreamBuildConfig, name: str, split: str, sha256: str) -> str:
    """Return whether the cache holds the stream with this digest."""
    meta = cache.read_meta(paths.REPO_ROOT / cfg.cache_dir, f"{name}_{split}")
    if not meta:
        return UNCACHED
    return CACHED if meta.get("sha256") == sha256 else STALE
