"""Files that are either complete or absent, whatever happens while they are written."""

import os
import secrets
from pathlib import Path

from steepest.training.errors import OutputError

__all__ = ["prepare_folder", "write_atomically"]


def prepare_folder(folder: Path) -> None:
    """Make a folder, see that it can be written to, and remove what killed writers left in it.

    Args:
        folder: The folder.

    Raises:
        OutputError: If it cannot be made or written to; told now, and not after an hour of training.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        probe = folder / "probe"
        write_atomically(probe, "can this folder be written to?\n")
        probe.unlink()
    except (OSError, OutputError) as error:
        reason = error.__cause__ if isinstance(error, OutputError) else error
        raise OutputError(
            f"the folder {folder} cannot be written to ({getattr(reason, 'strerror', reason)}): name another one with "
            "--out"
        ) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is either complete or as it was, whatever happens.

    Args:
        path: Where to.
        content: Text (written as UTF-8) or bytes.

    Raises:
        OutputError: If it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    # Not tempfile: its files are for their owner only, and a rename would keep that.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(
                f"{path} cannot be written ({error.strerror or error}); what was written before is complete: make room "
                "or name another folder, and go on from there"
            ) from error
        raise
