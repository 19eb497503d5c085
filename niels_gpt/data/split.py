"""One rule for every split into train and val: by document, ranked by a keyed hash."""

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeVar

Doc = TypeVar("Doc")


def split_by_key(
    docs: Iterable[Doc], key: Callable[[Doc], bytes], *, val_frac: float, seed: int
) -> tuple[list[Doc], list[Doc]]:
    """Split into (train, val), val being the `max(1, int(n * val_frac))` lowest ranks, in order.

    The rank of a document is the SHA-256 of (seed, key). Adding, removing or renaming another
    document does not change it, so such a change moves at most one document across the boundary.
    With fewer than 2 documents val is empty.

    Raises:
        ValueError: unless 0 <= val_frac < 1.
    """
    if not 0 <= val_frac < 1:
        raise ValueError(f"val_frac={val_frac} must be at least 0 and below 1")
    docs = list(docs)
    if len(docs) < 2:
        return docs, []
    ranked = sorted(
        range(len(docs)), key=lambda i: (hashlib.sha256(b"%d\0" % seed + key(docs[i])).digest(), i)
    )
    val = set(ranked[: max(1, int(len(docs) * val_frac))])
    return (
        [doc for i, doc in enumerate(docs) if i not in val],
        [doc for i, doc in enumerate(docs) if i in val],
    )
