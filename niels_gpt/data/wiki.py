"""The wiki text: from a folder, else WikiText-103, else the fallback text."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from niels_gpt import paths
from niels_gpt.data.python_docs import load_python_docs, python_docs_digest, python_docs_origin
from niels_gpt.data.recipe import (
    Documents,
    Joined,
    Made,
    Reading,
    Recipe,
    Remark,
    Unavailable,
    stamps,
)
from niels_gpt.data.text import not_utf8
from niels_gpt.files.mapped import open_bytes

BUILDER = 3  # of a folder; counts changes of what is made of the same files
FILE_NAMES = (("train.txt", "val.txt"), ("wiki.train.raw", "wiki.valid.raw"))
WIKITEXT = "WikiText-103"


def recipes(how: Reading) -> Iterator[Recipe]:
    """Yield the recipe of the folder (default `data/wiki/`), else of WikiText and the fallback."""
    default = paths.REPO_ROOT / "data" / "wiki"
    folder = how.place or (default if default.is_dir() else None)
    if folder is not None:
        yield _folder_recipe(Path(os.path.abspath(folder)))
        return
    yield wikitext_recipe(how)
    if how.fallback:
        recipe = _docs_recipe(python_docs_origin(), how.separator, load_python_docs)
        inputs = {**recipe.inputs, "content": python_docs_digest()}
        yield recipe._replace(inputs=inputs, spares=WIKITEXT)


def wikitext_recipe(how: Reading) -> Recipe:
    """Return the recipe of WikiText-103, using the given loader."""

    def load() -> Documents:
        if how.load_wikitext is None:
            raise Unavailable(f"{WIKITEXT} is not in the cache; niels-gpt data fetch downloads it")
        try:
            return how.load_wikitext()
        except Exception as error:  # no package, no network, or anything the hub's client raises
            raise Unavailable(" ".join(str(error).split())) from error

    recipe = _docs_recipe(WIKITEXT, how.separator, load)
    return recipe._replace(remedy="give --wiki DIR (with train.txt and val.txt)")


def _folder_recipe(folder: Path) -> Recipe:
    """Use the raw bytes of the files; each split is one document."""
    if folder.is_file():
        raise Unavailable(f"{folder} is a file, not a folder with train.txt and val.txt")
    for names in FILE_NAMES:
        train, val = (folder / name for name in names)
        if train.is_file() and val.is_file():
            break
    else:
        wanted = ", or ".join(" and ".join(names) for names in FILE_NAMES)
        raise Unavailable(f"the folder {folder} must have {wanted}")

    def build() -> Made:
        sides = open_bytes(train), open_bytes(val)
        problems = zip((train, val), map(not_utf8, sides), strict=True)
        return Made(*sides, altered=[Remark(str(path), why) for path, why in problems if why])

    return Recipe(
        origin="folder",
        place=str(folder),
        inputs={"builder": BUILDER, "files": stamps([train, val])},
        build=build,
        spares=WIKITEXT,
    )


def _docs_recipe(origin: str, sep: str, load: Callable[[], Documents]) -> Recipe:
    def build() -> tuple[Joined, Joined]:
        docs = load()
        return Joined(docs["train"], sep), Joined(docs["val"], sep)

    return Recipe(origin, "", {"sep": sep}, build)
