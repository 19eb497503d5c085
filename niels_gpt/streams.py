"""From texts to byte streams: where each source comes from, how it is split, what is known of it.

A source ("wiki", "roam", "primer") becomes two `bytes`, train and val, by a recipe: a JSON-like
dict that names every input, and a function that makes the two. The cache serves streams whose
recorded inputs equal the recipe's; otherwise both are built, and cached.

Nothing here prints. What the user should know lies in the returned dicts: `missing` (source ->
why it was left out), `messages` (sentences), and `describe_sources` for origin, size and digest.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from niels_gpt import paths
from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.data import cache
from niels_gpt.data.primer import DIALOGUE_DELIM, load_primer_text, split_primer_dialogues
from niels_gpt.data.python_docs import load_python_docs, python_docs_origin
from niels_gpt.data.roam import SKIPPED_BY_DESIGN, load_texts, scan_notes, split_roam_paths
from niels_gpt.data.wikitext import load_wikitext

SPLITS = ("train", "val")
WIKI_FILE_NAMES = (("train.txt", "val.txt"), ("wiki.train.raw", "wiki.valid.raw"))
WIKITEXT = "WikiText-103"


@dataclass(frozen=True)
class StreamBuildConfig:
    """What to build and from where; a relative `cache_dir` lies under `paths.REPO_ROOT`.

    Required sources that cannot be built raise, unless `allow_missing_sources`; enabled ones that
    are not required are left out. `write_cache=False` reads the cache and leaves it as it is;
    `fetch=False` takes WikiText-103 from the cache or not at all.
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
    allow_missing_sources: bool = False
    enabled_sources: tuple[str, ...] = ("wiki", "roam", "primer")
    required_sources: tuple[str, ...] = ("wiki", "roam", "primer")
    T: int = 256
    wiki_root: str | Path | None = None
    wiki_fallback: bool = False
    write_cache: bool = True
    fetch: bool = True


def locate(places: Mapping[str, str | Path], *, write_cache: bool = True) -> StreamBuildConfig:
    """Return where the sources are read from: as given by name, else their default places.

    FileNotFoundError for a place that is given and is not there: only at its default place may
    a source be absent.
    """
    if "roam" in places and not Path(places["roam"]).is_dir():
        raise FileNotFoundError(f"--roam {places['roam']}: no such folder")
    if "primer" in places and not Path(places["primer"]).is_file():
        raise FileNotFoundError(f"--primer {places['primer']}: no such file")
    fields = {"wiki": "wiki_root", "roam": "roam_root", "primer": "primer_path"}
    given: dict[str, Any] = {fields[name]: place for name, place in places.items()}
    return StreamBuildConfig(write_cache=write_cache, **given)


class SourceInfo(NamedTuple):
    """One stream as users are told about it; all but `place` is the same on every machine."""

    origin: str  # what the text is, e.g. "notes" or "WikiText-103"; "given" when unknown
    place: str  # the folder or file it was read from, "" where there is none
    nbytes: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.origin}, {self.nbytes:,} bytes, sha256 {self.sha256[:12]}"

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it."""
        return {"origin": self.origin, "bytes": self.nbytes, "sha256": self.sha256}


class Built(NamedTuple):
    """A stream and what is known of it."""

    stream: bytes
    info: SourceInfo


class Sources(dict[str, bytes]):
    """Streams by source name, with what is known of them beside.

    `missing` says why an enabled source is absent, `messages` are sentences for the user.
    """

    def __init__(
        self, built: Mapping[str, Built], missing: Mapping[str, str], messages: Iterable[str]
    ) -> None:
        super().__init__({name: b.stream for name, b in built.items()})
        self.built = dict(built)
        self.missing = dict(missing)
        self.messages = list(messages)

    def left_out(self) -> list[str]:
        """Say of each absent source why."""
        return [f"{name}: left out ({why})" for name, why in self.missing.items()]


class Recipe(NamedTuple):
    """How to make the two streams of a source, and from exactly which inputs."""

    source: str
    origin: str
    place: str
    inputs: dict[str, Any]  # JSON-like; with `origin`: equal inputs, equal streams
    build: Callable[[], tuple[bytes, bytes]]

    def meta(self, split: str) -> dict[str, Any]:
        """Name everything that the stream of `split` depends on."""
        return {"source": self.source, "split": split, "origin": self.origin, **self.inputs}


class Unavailable(RuntimeError):
    """A source cannot be built; the text says why."""


# --- texts to bytes ----------------------------------------------------------------------------


def build_wiki_stream(docs: Iterable[str], *, sep: str) -> bytes:
    """Join documents by `sep` as UTF-8; a lone surrogate becomes "?"."""
    return _join(docs, sep)


def build_roam_stream(docs: Iterable[str], *, sep: str) -> bytes:
    """Join notes by `sep` as UTF-8; a lone surrogate becomes "?"."""
    return _join(docs, sep)


def build_primer_stream(text: str) -> bytes:
    """Encode the primer as UTF-8; a lone surrogate becomes "?"."""
    return text.encode(errors="replace")


def _join(docs: Iterable[str], sep: str) -> bytes:
    return sep.encode(errors="replace").join(doc.encode(errors="replace") for doc in docs)


# --- all sources at once -----------------------------------------------------------------------


def build_sources(cfg: StreamBuildConfig | None = None) -> tuple[Sources, Sources]:
    """Build every enabled source; return (train, val), each a dict from name to stream.

    The wiki text is that of `wiki_root` (or of `data/wiki/` under the root, where it exists); else
    WikiText-103, cached or through `datasets`; else, with `wiki_fallback`, Python's documentation.

    Raises RuntimeError for a required source that cannot be built, ValueError for a stream shorter
    than T + 1 (of a source that is not required, the val split is left out instead) and for
    names in `enabled_sources` and `required_sources` that do not fit.
    """
    cfg = cfg or StreamBuildConfig()
    _check(cfg)
    train: dict[str, Built] = {}
    val: dict[str, Built] = {}
    missing: dict[str, str] = {}
    messages: list[str] = []
    for source in cfg.enabled_sources:
        required = source in cfg.required_sources
        try:
            built_train, built_val = _BUILDERS[source](cfg, messages)
            if required and not built_val.stream:
                raise Unavailable("its validation split would be empty: too few documents")
        except (Unavailable, OSError) as why:
            if required and not cfg.allow_missing_sources:
                raise RuntimeError(_cannot_build(source, why)) from why
            missing[source] = str(why)
            continue
        train[source] = _long_enough(built_train, source, "train", cfg.T)
        if required or len(built_val.stream) > cfg.T:
            val[source] = _long_enough(built_val, source, "val", cfg.T)
        else:
            messages.append(
                f"{source}: its validation split has {len(built_val.stream)} bytes, fewer than "
                f"T+1={cfg.T + 1}, so it is used for training only"
            )
    return Sources(train, missing, messages), Sources(val, missing, messages)


def build_train_val_sources(
    model_cfg: ModelConfig, train_cfg: TrainConfig, *, build_cfg: StreamBuildConfig | None = None
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Build what a run needs: (train, val) with T and seed from the run's configs.

    Train has those sources of `p_train` (probability above 0) that are there. Val has "wiki" at
    least, on which every run is evaluated, whether or not it trains on it. Notes and primer may be
    missing and the wiki text may be the embedded default, but a wiki folder has to be complete.
    """
    wanted = [name for name, probability in train_cfg.p_train.items() if probability > 0]
    cfg = replace(
        build_cfg or StreamBuildConfig(),
        T=model_cfg.T,
        seed=train_cfg.seed,
        enabled_sources=tuple(dict.fromkeys(["wiki", *wanted])),
        required_sources=("wiki",),
        allow_missing_sources=True,
        wiki_fallback=True,
    )
    train, val = build_sources(cfg)
    if "wiki" not in val:
        missing: Mapping[str, str] = getattr(val, "missing", {})
        raise RuntimeError(_cannot_build("wiki", missing.get("wiki", "no validation text")))
    return _only(train, wanted), val


def fetch_wikitext(cfg: StreamBuildConfig | None = None) -> tuple[Sources, Sources]:
    """Get WikiText-103 into the cache; return (train, val). What is cached already is not fetched.

    RuntimeError says why it cannot be had.
    """
    cfg = cfg or StreamBuildConfig()
    messages: list[str] = []
    try:
        train, val = _make(_wikitext_recipe(cfg), cfg, messages)
    except Unavailable as why:
        raise RuntimeError(f"{WIKITEXT} cannot be had: {why}") from why
    return Sources({"wiki": train}, {}, messages), Sources({"wiki": val}, {}, messages)


def describe_sources(sources: Mapping[str, bytes]) -> dict[str, SourceInfo]:
    """Say of each stream what it is, its size and digest; hashes only what was not built here."""
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
    if unknown := [name for name in cfg.enabled_sources if name not in _BUILDERS]:
        raise ValueError(f"unknown sources {unknown}; there are {list(_BUILDERS)}")
    if extra := [name for name in cfg.required_sources if name not in cfg.enabled_sources]:
        raise ValueError(
            "required_sources has to be a subset of enabled_sources "
            f"{list(cfg.enabled_sources)}, but has {extra}"
        )


def _cannot_build(source: str, why: object) -> str:
    return f"source {source!r} cannot be built: {why}"


def _long_enough(built: Built, source: str, split: str, T: int) -> Built:
    if len(built.stream) < T + 1:
        raise ValueError(
            f"source {source!r}, split {split!r}: {len(built.stream)} bytes, "
            f"too short for T={T} (needs T+1={T + 1})"
        )
    return built


# --- one source --------------------------------------------------------------------------------


def _build_wiki(cfg: StreamBuildConfig, messages: list[str]) -> tuple[Built, Built]:
    folder = Path(cfg.wiki_root) if cfg.wiki_root is not None else _default_wiki_folder()
    if folder is not None:
        return _make(_folder_recipe(folder), cfg, messages)
    try:
        return _make(_wikitext_recipe(cfg), cfg, messages)
    except Unavailable as why:
        if not cfg.wiki_fallback:
            raise Unavailable(f"{why}. Or give a folder with train.txt and val.txt") from why
        built = _make(_python_docs_recipe(cfg), cfg, messages)
        messages.append(
            f"wiki: the embedded default is used, the {built[0].info.origin}. For Wikipedia give "
            f"--wiki DIR, or make WikiText-103 available: {why}"
        )
        return built


def _build_roam(cfg: StreamBuildConfig, messages: list[str]) -> tuple[Built, Built]:
    root = Path(os.path.abspath(cfg.roam_root))
    found, skipped = scan_notes(root)
    if not found:
        no_folder = "" if root.is_dir() else ", which is no folder"
        raise Unavailable(f"no notes (*.md) under {root}{no_folder}")
    if lost := [s for s in skipped if s.reason not in SKIPPED_BY_DESIGN]:
        messages.append(f"roam: {len(lost)} left out, the first {lost[0].path}: {lost[0].reason}")

    def build() -> tuple[bytes, bytes]:
        train, val = split_roam_paths(found, val_frac=cfg.roam_val_frac, seed=cfg.seed, root=root)
        return (
            build_roam_stream(load_texts(train), sep=cfg.doc_separator),
            build_roam_stream(load_texts(val), sep=cfg.doc_separator),
        )

    inputs = {
        "files": _stamps(found),
        "sep": cfg.doc_separator,
        "seed": cfg.seed,
        "val_frac": cfg.roam_val_frac,
    }
    return _make(Recipe("roam", "notes", str(root), inputs, build), cfg, messages)


def _build_primer(cfg: StreamBuildConfig, messages: list[str]) -> tuple[Built, Built]:
    path = Path(os.path.abspath(cfg.primer_path))
    if not path.is_file():
        raise Unavailable(f"no primer file at {path}")

    def build() -> tuple[bytes, bytes]:
        train, val = split_primer_dialogues(
            load_primer_text(path),
            val_frac=cfg.primer_val_frac,
            seed=cfg.seed,
            delimiter=cfg.delimiter,
        )
        return build_primer_stream(train), build_primer_stream(val)

    inputs = {
        "path": str(path),
        "files": _stamps([path]),
        "delimiter": cfg.delimiter,
        "seed": cfg.seed,
        "val_frac": cfg.primer_val_frac,
    }
    return _make(Recipe("primer", "primer", str(path), inputs, build), cfg, messages)


_BUILDERS: dict[str, Callable[[StreamBuildConfig, list[str]], tuple[Built, Built]]] = {
    "wiki": _build_wiki,
    "roam": _build_roam,
    "primer": _build_primer,
}


def _default_wiki_folder() -> Path | None:
    folder = paths.REPO_ROOT / "data" / "wiki"
    return folder if folder.is_dir() else None


def _folder_recipe(folder: Path) -> Recipe:
    """Take the files' bytes as they are: each split is one document."""
    folder = Path(os.path.abspath(folder))
    for names in WIKI_FILE_NAMES:
        train, val = (folder / name for name in names)
        if train.is_file() and val.is_file():
            break
    else:
        wanted = ", nor ".join(" and ".join(names) for names in WIKI_FILE_NAMES)
        raise Unavailable(f"the folder {folder} does not have {wanted}")
    inputs = {"files": _stamps([train, val])}
    return Recipe(
        "wiki", "folder", str(folder), inputs, lambda: (train.read_bytes(), val.read_bytes())
    )


def _wikitext_recipe(cfg: StreamBuildConfig) -> Recipe:
    def load() -> dict[str, list[str]]:
        if not cfg.fetch:
            raise Unavailable(f"{WIKITEXT} is not in the cache; niels-gpt data fetch gets it")
        try:
            return load_wikitext()
        except Exception as error:  # no package, no network, whatever the hub's client raises
            raise Unavailable(" ".join(str(error).split())) from error

    return _docs_recipe(WIKITEXT, cfg.doc_separator, load)


def _python_docs_recipe(cfg: StreamBuildConfig) -> Recipe:
    return _docs_recipe(python_docs_origin(), cfg.doc_separator, load_python_docs)


def _docs_recipe(origin: str, sep: str, load: Callable[[], dict[str, list[str]]]) -> Recipe:
    def build() -> tuple[bytes, bytes]:
        docs = load()
        return build_wiki_stream(docs["train"], sep=sep), build_wiki_stream(docs["val"], sep=sep)

    return Recipe("wiki", origin, "", {"sep": sep}, build)


def _stamps(files: Iterable[Path]) -> list[dict[str, Any]]:
    stamps = []
    for path in files:
        status = path.stat()
        stamps.append({"path": str(path), "mtime_ns": status.st_mtime_ns, "size": status.st_size})
    return stamps


# --- from a recipe to streams ------------------------------------------------------------------


def _make(recipe: Recipe, cfg: StreamBuildConfig, messages: list[str]) -> tuple[Built, Built]:
    """Take both streams from the cache, or build them and cache them where that is possible."""
    folder = paths.REPO_ROOT / cfg.cache_dir
    streams = None if cfg.force_rebuild else _cached(folder, recipe, messages)
    if streams is None:
        train, val = recipe.build()
        if not train:
            raise Unavailable(f"there is no text in it ({recipe.place or recipe.origin})")
        streams = cache.digest(train), cache.digest(val)
        if cfg.write_cache and not _is_kept(folder, recipe):
            _write(folder, recipe, streams, messages)
    train_stream, val_stream = streams
    return _built(recipe, train_stream), _built(recipe, val_stream)


def _built(recipe: Recipe, stream: cache.Stream) -> Built:
    info = SourceInfo(recipe.origin, recipe.place, len(stream.data), stream.sha256)
    return Built(stream.data, info)


def _cached(
    folder: Path, recipe: Recipe, messages: list[str]
) -> tuple[cache.Stream, cache.Stream] | None:
    try:
        train = cache.read_stream(folder, f"{recipe.source}_train", recipe.meta("train"))
        val = cache.read_stream(folder, f"{recipe.source}_val", recipe.meta("val"))
    except cache.DamagedCacheError as damage:
        messages.append(f"cache: {damage}, so it is built again")
        return None
    return None if train is None or val is None else (train, val)


def _is_kept(folder: Path, recipe: Recipe) -> bool:
    """Whether WikiText-103 is cached, which took a download, and `recipe` would replace it."""
    if recipe.source != "wiki" or recipe.origin == WIKITEXT:
        return False
    return cache.read_meta(folder, "wiki_train").get("origin") == WIKITEXT


def _write(
    folder: Path,
    recipe: Recipe,
    streams: tuple[cache.Stream, cache.Stream],
    messages: list[str],
) -> None:
    items = [
        (f"{recipe.source}_{split}", recipe.meta(split), stream)
        for split, stream in zip(SPLITS, streams, strict=True)
    ]
    try:
        cache.write_streams(folder, items)
    except OSError as error:
        messages.append(f"cache: {error}; without it the streams are built anew each time")
