"""Files that are either complete or absent, whatever happens while they are written."""

from pathlib import Path

from steepest._files import write_atomically
from steepest.errors import OutputError

__all__ = ["prepare_folder", "why", "write_atomically"]


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
        raise OutputError(
            f"the folder {folder} cannot be written to ({why(error)}): name another one with --out"
        ) from error


def why(error: OSError | OutputError) -> str:
    """Say why a folder cannot be made or written to.

    Args:
        error: What was raised.

    Returns:
        The reason, in the words of the system.
    """
    reason = error.__cause__ if isinstance(error, OutputError) else error
    if isinstance(reason, FileExistsError):  # so says mkdir, of a file where the folder should be
        return "Not a directory"
    return str(getattr(reason, "strerror", reason))
