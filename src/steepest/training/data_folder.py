"""The folder of the data sets that a user has as files."""

import os
from pathlib import Path

from steepest.training.errors import DataError
from steepest.training.task import FileTask

__all__ = ["VARIABLE", "data_folder"]

VARIABLE = "STEEPEST_DATA"


def data_folder(given: str | None, entry: FileTask) -> Path:
    """Find the folder.

    Args:
        given: What the user named; None takes the environment variable `STEEPEST_DATA`.
        entry: The task that needs it, for the messages.

    Returns:
        The folder.

    Raises:
        DataError: If none was named or it does not exist.
    """
    named = given or os.environ.get(VARIABLE)
    if not named:
        raise DataError(
            f"task {entry.name} reads files ({entry.files}): name their folder with --data or {VARIABLE}; "
            f"they come from {entry.origin}"
        )
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise DataError(f"the data folder {folder} {'is no folder' if folder.exists() else 'does not exist'}")
    return folder
