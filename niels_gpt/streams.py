"""From texts to byte streams: the origin, split, size and digest of each source.

A source ("wiki", "roam", "primer", "text") becomes two `bytes`, train and val, by a recipe: a
JSON-like dict that names every input, and a function that builds both. The cache serves streams
whose recorded inputs equal the recipe's; otherwise both are built and cached.

Nothing here prints. Information for the user is in the returned dicts: `missing` (source -> why it
was left out), `messages`, and `describe_sources` for origin, size and digest.
"""

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from niels_gpt import paths
from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.data import cache
from niels_gpt.data.primer import DIALOGUE_DELIM
from niels_gpt.data.recipe import (
    WITHOUT_MACHINE_LINES,
    Made,
    Reading,
    Recipe,
    Remark,
    Unavailable,
    join_documents,
    tell,
    to_bytes,
)
from niels_gpt.data.sources import SOURCES, Given, Place, all_places, check_place, option_of
from niels_gpt.data.wiki import WIKITEXT, wikitext_recipe
from niels_gpt.data.wikitext import load_wikitext

SPLITS = ("train", "val")


@dataclass(frozen=True)
class StreamBuildConfig:
    """What to build and from where; a relative `cache_dir` is below `paths.REPO_ROOT`.

    Required sources that cannot be built raise, unless `allow_missing_sources`; others are left
    out. `write_cache=False` reads the cache without changing it; `fetch=False` takes WikiText-103
    only from the cache. `places` overrides `wiki_root`, `roam_root` and `primer_path` by name. What
    the user `demanded` in the mix must be there, as must what has a place.
    """

    roam_root: str | Path = field(default_factory=lambda: paths.ROAM_DIR)
    primer_path: str | Path = field(default_factory=lambda: paths.primer_path())
    cache_dir: str | Path = "data/cache/streams"
    doc_separator: str = "\n\n"
    roam_val_frac: float = 0.10
    primer_val_frac: float = 0.10
    seed: int = 42
    delimiter: str = DIALOGUE_DELIM
    force_rebuild: bool = False
    verify: bool = False  # hash every cached stream, also large ones that are as they were written
    allow_missing_sources: bool = False
    enabled_sources: tuple[str, ...] = ("wiki", "roam", "primer")
    required_sources: tuple[str, ...] = ("wiki", "roam", "primer")
    T: int = 256
    wiki_root: str | Path | None = None
    wiki_fallback: bool = False
    write_cache: bool = True
    fetch: bool = True
    skip_machine_lines: bool | None = None  # of notes; None: as a checkpoint has it, else no
    places: Mapping[str, Place] = field(default_factory=dict)  # by source
    demanded: tuple[str, ...] = ()
    any_val: bool = False  # whether any source may decide best.pt, not only `val_source`


def locate(given: Given, *, write_cache: bool = True) -> StreamBuildConfig:
    """Return where to read the sources: the given places, else the defaults.

    A source with a given place is enabled.

    Raises:
        FileNotFoundError: if a given place does not exist. Only a default place may be absent.
    """
    for name, there in given.places.items():
        for place in all_places(there):
            check_place(name, place)
    enabled = dict.fromkeys([*StreamBuildConfig.enabled_sources, *given.places])
    return StreamBuildConfig(
        places=given.places,
        enabled_sources=tuple(enabled),
        write_cache=write_cache,
        skip_machine_lines=given.skip_machine_lines,
        demanded=tuple(name for name, share in (given.mix or {}).items() if share),
    )


def as_recorded(
    cfg: StreamBuildConfig, records: Mapping[str, Mapping[str, Mapping[str, Any]]] | None
) -> StreamBuildConfig:
    """Read text as that of a checkpoint was read, where the user has not said how.

    Args:
        records: of the checkpoint: split -> source -> `SourceInfo.record`.
    """
    if cfg.skip_machine_lines is not None or records is None:
        return cfg
    origins = [str(info.get("origin")) for split in records.values() for info in split.values()]
    skip = any(origin.endswith(WITHOUT_MACHINE_LINES) for origin in origins)
    return replace(cfg, skip_machine_lines=skip)


class SourceInfo(NamedTuple):
    """The description of a stream; all but `place` is the same on every machine."""

    origin: str  # e.g. "notes" or "WikiText-103"; "given" if unknown
    place: str  # the folder or file it was read from, "" if there is none
    nbytes: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.origin}, {self.nbytes:,} bytes, sha256 {self.sha256[:12]}"

    def record(self) -> dict[str, Any]:
        """Return the fields stored in a checkpoint."""
        return {"origin": self.origin, "bytes": self.nbytes, "sha256": self.sha256}


class Built(NamedTuple):
    """A stream with its description."""

    stream: bytes
    info: SourceInfo
    recipe: Recipe | None = None
    report: Mapping[str, Any] = MappingProxyType({})  # see `Made.reports`
    unread: Sequence[Remark] = ()  # files that could not be read now


class Sources(dict[str, bytes]):
    """Streams by source name, with their descriptions.

    `missing` says why an enabled source is absent; `messages` are for the user.
    """

    def __init__(
        self, built: Mapping[str, Built], missing: Mapping[str, str], messages: Iterable[str]
    ) -> None:
        super().__init__({name: b.stream for name, b in built.items()})
        self.built = dict(built)
        self.missing = dict(missing)
        self.messages = list(messages)

    def left_out(self) -> list[str]:
        """Return a message for each absent source."""
        return [f"{name}: left out ({why})" for name, why in self.missing.items()]


# --- texts to bytes ----------------------------------------------------------------------------

build_wiki_stream = build_roam_stream = join_documents
build_primer_stream = to_bytes


# --- all sources at once -----------------------------------------------------------------------


def build_sources(cfg: StreamBuildConfig | None = None) -> tuple[Sources, Sources]:
    """Build every enabled source; return (train, val), each a dict from name to stream.

    The wiki text is in `wiki_root` (or in `data/wiki/` below the root, if that exists); else it is
    WikiText-103, cached or through `datasets`; else, with `wiki_fallback`, Python's documentation.

    Raises:
        RuntimeError: if a source that is required or in `places` cannot be built.
        ValueError: if its stream is shorter than T + 1 (any other source is left out instead, the
            val split alone of a source that is not required too), or for an unknown or inconsistent
            source name.
    """
    cfg = cfg or StreamBuildConfig()
    _check(cfg)
    train: dict[str, Built] = {}
    val: dict[str, Built] = {}
    missing: dict[str, str] = {}
    messages: list[str] = []
    for source in cfg.enabled_sources:
        try:
            train[source], built_val = _long_enough(source, cfg, messages)
        except Unavailable as why:
            missing[source] = str(why)
            continue
        if built_val is not None:
            val[source] = built_val
    return Sources(train, missing, messages), Sources(val, missing, messages)


def _long_enough(
    source: str, cfg: StreamBuildConfig, messages: list[str]
) -> tuple[Built, Built | None]:
    """Build a source; return its train split, and its val split unless that is too short.

    Raises:
        Unavailable: if it is to be left out; the text says why.
        RuntimeError, ValueError: if it must not be, as `build_sources`.
    """
    required, named = source in cfg.required_sources, source in (*cfg.places, *cfg.demanded)
    try:
        train, val = _build(source, cfg, messages)
        if required and not val.stream:
            raise Unavailable("its validation split would be empty: too few documents")
    except (Unavailable, OSError) as why:
        if named or (required and not cfg.allow_missing_sources):
            raise RuntimeError(_cannot_build(source, why) + _remedy(source, cfg)) from why
        raise Unavailable(str(why)) from why
    if short := _too_short(train, "train", cfg.T):
        if required or named:
            raise ValueError(f"source {source!r}, {short}")
        raise Unavailable(short)
    short = _too_short(val, "val", cfg.T)
    if not short:
        return train, val
    if required:
        raise ValueError(f"source {source!r}, {short}")
    if cfg.T:  # else nothing is trained
        messages.append(
            f"{source}: its validation split has {len(val.stream)} bytes, fewer than "
            f"T+1={cfg.T + 1}, so it is used for training only"
        )
    return train, None


def build_train_val_sources(
    model_cfg: ModelConfig, train_cfg: TrainConfig, *, build_cfg: StreamBuildConfig | None = None
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Build what a run needs: (train, val) with T and seed from the run's configs.

    Train has the available sources of `p_train` with probability above 0. Val also has
    `val_source`, on which the run is evaluated even if it does not train on it, unless `any_val`
    will do. Notes and primer may be missing, and the wiki text may be the fallback text, but a wiki
    folder must be complete, and what lies in `places` must be text, even if it has no share.
    """
    build_cfg = build_cfg or StreamBuildConfig()
    wanted = [name for name, probability in train_cfg.p_train.items() if probability > 0]
    needed = [] if build_cfg.any_val else [train_cfg.val_source]
    cfg = replace(
        build_cfg,
        T=model_cfg.T,
        seed=train_cfg.seed,
        enabled_sources=tuple(dict.fromkeys([*needed, *wanted, *build_cfg.places])),
        required_sources=tuple(needed),
        allow_missing_sources=True,
        wiki_fallback=True,
    )
    train, val = build_sources(cfg)
    if lacking := [name for name in needed if name not in val]:
        missing: Mapping[str, str] = getattr(val, "missing", {})
        why = missing.get(lacking[0], "no validation text")
        raise RuntimeError(_cannot_build(lacking[0], why))
    return _only(train, wanted), _only(val, [*needed, *wanted])


def fetch_wikitext(cfg: StreamBuildConfig | None = None) -> tuple[Sources, Sources]:
    """Download WikiText-103 into the cache unless it is there; return (train, val).

    Raises:
        RuntimeError: saying why it is not available.
    """
    cfg = cfg or StreamBuildConfig()
    messages: list[str] = []
    try:
        train, val = _make("wiki", wikitext_recipe(reading("wiki", cfg)), cfg, messages)
    except Unavailable as why:
        raise RuntimeError(f"{WIKITEXT} is not available: {why}") from why
    return Sources({"wiki": train}, {}, messages), Sources({"wiki": val}, {}, messages)


def describe_sources(sources: Mapping[str, bytes]) -> dict[str, SourceInfo]:
    """Return the description of each stream; only streams not built here are hashed."""
    return {name: _describe(sources, name) for name in sources}


def _describe(sources: Mapping[str, bytes], name: str) -> SourceInfo:
    stream = sources[name]
    if isinstance(sources, Sources):
        built = sources.built.get(name)
        if built is not None and built.stream is stream:
            return built.info
    return SourceInfo("given", "", len(stream), cache.digest(stream).sha256)


def _only(sources: dict[str, bytes], names: Collection[str]) -> dict[str, bytes]:
    if isinstance(sources, Sources):
        built = {name: b for name, b in sources.built.items() if name in names}
        return Sources(built, sources.missing, sources.messages)
    return {name: stream for name, stream in sources.items() if name in names}


def _check(cfg: StreamBuildConfig) -> None:
    if unknown := [name for name in cfg.enabled_sources if name not in SOURCES]:
        raise ValueError(f"unknown sources {unknown}; known: {list(SOURCES)}")
    if extra := [name for name in cfg.required_sources if name not in cfg.enabled_sources]:
        raise ValueError(
            "required_sources must be a subset of enabled_sources "
            f"{list(cfg.enabled_sources)}, but has {extra}"
        )


def _cannot_build(source: str, why: object) -> str:
    return f"source {source!r} cannot be built: {why}"


def _remedy(source: str, cfg: StreamBuildConfig) -> str:
    """Return what to do about a source of the mix that has no place and is not there."""
    if source in cfg.places or source not in cfg.demanded:
        return ""
    metavar = SOURCES[source].metavar
    return f"; give {option_of(source)} {metavar}, or leave it out of --mix"


def _too_short(built: Built, split: str, T: int) -> str:
    """Return what is wrong if a stream is shorter than a window, else ""."""
    if (length := len(built.stream)) > T:
        return ""
    return f"split {split!r}: {length} bytes, too short for T={T} (needs T+1={T + 1})"


# --- one source --------------------------------------------------------------------------------


def reading(source: str, cfg: StreamBuildConfig) -> Reading:
    """Return how to read a source; three of them have their own fields in the config."""
    shared = Reading(
        place="",
        seed=cfg.seed,
        separator=cfg.doc_separator,
        val_frac=0.1,
        load_wikitext=load_wikitext if cfg.fetch else None,
        fallback=cfg.wiki_fallback,
        skip_machine_lines=bool(cfg.skip_machine_lines),
    )
    own: dict[str, dict[str, Any]] = {
        "wiki": {"place": cfg.wiki_root or ""},
        "roam": {"place": cfg.roam_root, "val_frac": cfg.roam_val_frac},
        "primer": {
            "place": cfg.primer_path,
            "val_frac": cfg.primer_val_frac,
            "separator": cfg.delimiter,
        },
    }
    how = shared._replace(**own.get(source, {}))
    place, *more = all_places(cfg.places.get(source, how.place))
    return how._replace(place=place, more=tuple(more))


def _build(source: str, cfg: StreamBuildConfig, messages: list[str]) -> tuple[Built, Built]:
    """Use the first recipe that is available; add a message if it is a fallback."""
    recipes = iter(SOURCES[source].recipes(reading(source, cfg)))
    wanted = next(recipes)
    try:
        return _make(source, wanted, cfg, messages)
    except Unavailable as why:
        for recipe in recipes:
            with contextlib.suppress(Unavailable):
                built = _make(source, recipe, cfg, messages)
                messages.append(
                    f"{source}: using the fallback text, {recipe.origin}. For other text, "
                    f"{wanted.remedy}, or make {wanted.origin} available: {why}"
                )
                return built
        raise Unavailable(
            f"{why}. Alternatively, {wanted.remedy}" if wanted.remedy else str(why)
        ) from why


def _make(
    source: str, recipe: Recipe, cfg: StreamBuildConfig, messages: list[str]
) -> tuple[Built, Built]:
    """Take both streams from the cache, or build them and cache them if possible."""
    messages += [f"{source}: {message}" for message in recipe.messages]
    folder = paths.REPO_ROOT / cfg.cache_dir
    names = [f"{source}_{split}" for split in SPLITS]
    metas = [
        {"source": source, "split": split, "origin": recipe.origin, **recipe.inputs}
        for split in SPLITS
    ]
    streams = None if cfg.force_rebuild else _cached(folder, names, metas, messages, cfg)
    unread: Sequence[Remark] = ()
    if streams is None:
        made = Made(*recipe.build())
        if not any(cache.parts(made.train)):
            raise Unavailable(f"it has no text ({recipe.place or recipe.origin})")
        unread = made.unread
        messages += [f"{source}: {message}" for message in tell("left out", unread)]
        if made.files is not None:
            metas = [{**meta, "files": made.files} for meta in metas]
        is_kept = cfg.write_cache and not _is_spared(folder, names, recipe)
        streams = _write(folder, names, metas, made, messages) if is_kept else _hold(made)
    train_stream, val_stream = streams
    messages += [f"{source}: {message}" for message in _told(train_stream.report)]
    return _built(recipe, train_stream, unread), _built(recipe, val_stream, unread)


def _write(
    folder: Path, names: list[str], metas: list[dict[str, Any]], made: Made, messages: list[str]
) -> list[cache.Stream]:
    """Cache both streams if possible."""
    texts = (made.train, made.val)
    try:
        items = zip(names, metas, texts, made.reports(), strict=True)
        return cache.write_streams(folder, items) or _hold(made)
    except OSError as error:
        messages.append(f"cache: {error}; the streams are rebuilt each time")
        return _hold(made)


def _hold(made: Made) -> list[cache.Stream]:
    texts = (made.train, made.val)
    return [cache.hold(*pair) for pair in zip(texts, made.reports(), strict=True)]


def _cached(
    folder: Path,
    names: list[str],
    metas: list[dict[str, Any]],
    messages: list[str],
    cfg: StreamBuildConfig,
) -> list[cache.Stream] | None:
    try:
        found = [
            cache.read_stream(folder, name, meta, verify=cfg.verify)
            for name, meta in zip(names, metas, strict=True)
        ]
    except cache.DamagedCacheError as damage:
        messages.append(f"cache: {damage}; rebuilding it")
        return None
    streams = [stream for stream in found if stream is not None]
    if len(streams) < len(found):
        return None
    if cfg.write_cache:
        cache.keep_seals(folder, zip(names, streams, strict=True))
    return streams


def remarks(report: Mapping[str, Any], key: str) -> list[Remark]:
    """Return the files of a report's "altered" or "skipped"; what is not such a list is ignored."""
    pairs = [pair for pair in _list(report, key) if isinstance(pair, list)]
    return [Remark(*map(str, pair)) for pair in pairs if len(pair) == len(Remark._fields)]


def _told(report: Mapping[str, Any]) -> list[str]:
    return [
        *tell("not plain UTF-8", remarks(report, "altered")),
        *tell("left out", remarks(report, "skipped")),
        *map(str, _list(report, "messages")),
    ]


def _list(report: Mapping[str, Any], key: str) -> list[Any]:
    value = report.get(key)
    return value if isinstance(value, list) else []


def _is_spared(folder: Path, names: list[str], recipe: Recipe) -> bool:
    """Return whether the cache holds a download that `recipe` would replace."""
    return bool(recipe.spares) and cache.read_meta(folder, names[0]).get("origin") == recipe.spares


def _built(recipe: Recipe, stream: cache.Stream, unread: Sequence[Remark]) -> Built:
    info = SourceInfo(recipe.origin, recipe.place, len(stream.data), stream.sha256)
    return Built(stream.data, info, recipe, stream.report, unread)
