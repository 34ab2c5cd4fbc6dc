"""Checkpoints of a run as a whole: those that earlier versions wrote, and all of them when they are to go."""

import shutil
from pathlib import Path

from steepest.distributed.checkpoint import folders
from steepest.errors import CheckpointError, OutputError

__all__ = ["forget", "refuse_old_files"]


def refuse_old_files(folder: Path) -> None:
    """Refuse what earlier versions wrote: one file.

    Args:
        folder: The folder of a run's checkpoints.

    Raises:
        CheckpointError: If there is such a file.
    """
    for old in _old_files(folder):
        if old.is_file():
            raise CheckpointError(
                f"{old} is a checkpoint of an earlier version in one file, and this steepest reads folders: finish the "
                "run with the version that began it, or begin anew with --fresh"
            )


def _old_files(folder: Path) -> list[Path]:
    beside = ("checkpoint.pt", "checkpoint.previous.pt") if folder.name == "checkpoints" else ()
    return [folder, *(folder.with_name(name) for name in beside)]


def forget(folder: Path) -> None:
    """Remove all checkpoints of a run, with a selection under way, and those of earlier versions.

    Args:
        folder: The folder of a run's checkpoints.

    Raises:
        OutputError: If they cannot be removed.
    """
    try:
        for old in _old_files(folder):
            if old.is_file():
                old.unlink()
        folders.forget(folder)
        if folder.is_dir():
            shutil.rmtree(folder)
    except OSError as error:
        raise OutputError(f"{folder} cannot be removed ({error.strerror or error}): remove it yourself") from error
