"""One rule for every split into train and val: by document, ranked by a keyed hash."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Doc = TypeVar("Doc")


def split_by_key(
    docs: Iterable[Doc],
    key: Callable[[Doc], bytes],
    *,
    val_frac: float,
    seed: int,
    size: Callable[[Doc], int] = lambda doc: 0,
) -> tuple[list[Doc], list[Doc]]:
    """Split into (train, val), val being `max(1, int(n * val_frac))` low ranks, in order.

    The rank of a document is the SHA-256 of (seed, key). Val takes the lowest ranks, but passes
    over documents so large that one would take most of the text from training; see `_size_limit`.
    (Not bounded: the sum of several just below the limit; a new one could then move any number.)
    Adding, removing or renaming another document does not change the rank, so such a change moves
    at most one document across the boundary, and those that the limit passes over or no longer does
    (fewer than 1 / (2 * val_frac) exceed it). With fewer than 2 documents val is empty.

    Args:
        size: bytes of a document; without it, none is passed over.

    Raises:
        ValueError: unless 0 <= val_frac < 1.
    """
    if not 0 <= val_frac < 1:
        raise ValueError(f"val_frac={val_frac} must be at least 0 and below 1")
    docs = list(docs)
    if len(docs) < 2:
        return docs, []
    count = max(1, int(len(docs) * val_frac))
    sizes = [size(doc) for doc in docs]
    limit = _size_limit(sizes, count, val_frac)
    ranked = sorted(
        (i for i in range(len(docs)) if sizes[i] <= limit),
        key=lambda i: (hashlib.sha256(b"%d\0" % seed + key(docs[i])).digest(), i),
    )
    val = set(ranked[:count])
    return (
        [doc for i, doc in enumerate(docs) if i not in val],
        [doc for i, doc in enumerate(docs) if i in val],
    )


def _size_limit(sizes: Sequence[int], count: int, val_frac: float) -> float:
    """Return the size above which a document is passed over; at least `count` are not.

    That is twice the share of val in the bytes. If fewer documents than needed are that small, it
    is twice the size of the largest one that is needed, so that documents of like size are all the
    same.
    """
    limit = 2 * val_frac * sum(sizes)
    needed = sorted(sizes)[count - 1]
    return limit if needed <= limit else 2 * needed
