"""The file of a checkpoint: a payload in canonical form, with its digest, through `torch.save`."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from niels_gpt.files import durable
from niels_gpt.files.schema import Payload, canonical_payload, check_payload, content_digest
from niels_gpt.files.torchfile import CheckpointError, check_torch_file, read_torch_file


def write_payload(paths: Sequence[str | os.PathLike[str]], payload: Mapping[str, Any]) -> str:
    """Write a payload durably under each name in turn; return its digest.

    Payload and file must pass the checks of loading: a file that would not load is never written.

    Raises:
        CheckpointError: if a value cannot be stored or is not finite.
        OSError: if a file cannot be written; that name and those after it keep their content.
    """
    where = ", ".join(str(path) for path in paths)
    try:
        content = {key: value for key, value in payload.items() if key != "digest"}
        content = check_payload(canonical_payload(content))
        digest = content_digest(content)
        file = _encoded(content, digest)
        check_torch_file(file)
    except CheckpointError as error:
        raise CheckpointError(f"not saved to {where}: {error}") from None
    durable.write_durably([Path(path) for path in paths], file.getbuffer())
    return digest


def read_payload(path: Path) -> Payload:
    """Read a file and check all of it: container, content, and the digest if there is one.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not a good checkpoint, naming the first difference.
    """
    payload = check_payload(read_torch_file(path))
    if "digest" in payload and payload["digest"] != content_digest(payload):
        raise CheckpointError("the content does not match its digest")
    return payload


def file_size(payload: Mapping[str, Any]) -> int:
    """Return the size of a payload's file in bytes; the payload is not checked."""
    return _encoded(canonical_payload(payload), "0" * 64).getbuffer().nbytes


def _encoded(content: Payload, digest: str) -> io.BytesIO:
    file = io.BytesIO()
    torch.save({**content, "digest": digest}, file)
    return file
