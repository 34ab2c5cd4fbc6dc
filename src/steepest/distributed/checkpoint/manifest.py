"""The manifest of a checkpoint: what its tensors belong to, and by what one knows that all is as it was written."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steepest.distributed.checkpoint.tree import leaves
from steepest.errors import CheckpointError, DamagedCheckpointError

__all__ = ["FORMAT", "check_files", "check_tensors", "read_manifest", "write_manifest"]

FORMAT = 4
_NAME = "manifest.json"


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest, with a digest of itself, into a checkpoint that is not complete yet.

    Args:
        folder: The folder that it is written into.
        content: What JSON can hold.
    """
    with (folder / _NAME).open("x", encoding="utf-8") as file:
        file.write(_sealed(content))
        file.flush()
        os.fsync(file.fileno())


def _sealed(content: Mapping[str, Any]) -> str:
    return _text({**content, "sha256": hashlib.sha256(_text(content).encode()).hexdigest()})


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Args:
        folder: The checkpoint.

    Returns:
        Its content.

    Raises:
        DamagedCheckpointError: If it is not as it was written.
        CheckpointError: If it has another format.
    """
    path = folder / _NAME
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        whole = isinstance(content, dict) and _sealed({k: v for k, v in content.items() if k != "sha256"}) == text
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:160]
        raise DamagedCheckpointError(f"{path} cannot be read ({reason})") from error
    if not whole:
        raise DamagedCheckpointError(f"{path} is damaged: its SHA-256 is not the one within it")
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {content.get('format')!r}, this steepest reads {FORMAT}")
    return dict(content)


def check_files(folder: Path, files: Mapping[str, Any]) -> None:
    """See that files are what was written.

    Args:
        folder: The checkpoint.
        files: Size and SHA-256 by name.

    Raises:
        DamagedCheckpointError: If one is not.
    """
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                raise DamagedCheckpointError(f"{path} is damaged: it has {found} bytes and had {size}")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise DamagedCheckpointError(f"{path} is damaged: its SHA-256 is not the one in {_NAME}")
        except OSError as error:
            raise DamagedCheckpointError(f"{path} cannot be read ({error.strerror})") from error


def check_tensors(folder: Path, content: Mapping[str, Any]) -> None:
    """See that the list of tensors is harmless and has what the manifest speaks of.

    Args:
        folder: The checkpoint.
        content: Its manifest.

    Raises:
        DamagedCheckpointError: If not.
    """
    from steepest.distributed.checkpoint.tensors import METADATA, load_metadata

    listed = load_metadata(folder).state_dict_metadata
    for leaf in leaves(content["state"]):
        found = listed.get(leaf["key"])
        if found is None or list(found.size) != leaf["shape"]:  # type: ignore[union-attr]
            raise DamagedCheckpointError(f"{folder / METADATA} does not fit the manifest in {leaf['key']}")
