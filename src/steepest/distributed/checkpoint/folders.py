"""A folder of checkpoints: names, what is complete, what is to be removed.

`step-00000120` is complete: it got its name after everything in it was on disk. What begins with a dot is not, or no
longer.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from steepest.errors import OutputError

__all__ = ["begin", "complete", "complete_folders", "forget", "forget_newer", "is_checkpoint", "keep_newest", "writing"]

_NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")


def complete_folders(folder: Path) -> list[Path]:
    """The complete checkpoints.

    Args:
        folder: The folder of the checkpoints; it need not be there.

    Returns:
        Their folders, the newest last.
    """
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_order)


def is_checkpoint(path: Path) -> bool:
    """Whether something within such a folder is a checkpoint, or what is left of one."""
    return _NAME.fullmatch(path.name) is not None or (path.name.startswith(".") and path.name.endswith(".tmp"))


def _order(path: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(path.name)
    return (int(found[1]), int(found[2] or 0)) if found else (-1, 0)


def begin(folder: Path, steps: int) -> tuple[Path, Path]:
    """Make the folder that a checkpoint is written into, and remove what killed writers left.

    Args:
        folder: The folder of the checkpoints.
        steps: Number of the checkpoint, by which the newest is known.

    Returns:
        The folder to write into, and the one that it becomes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    # A second one at the same step: nothing was done since, or the first is damaged.
    taken = [_order(path)[1] for path in complete_folders(folder) if _order(path)[0] == steps]
    name = f"step-{steps:08d}" + (f".{max(taken) + 1}" if taken else "")
    temporary = folder / f".{name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    return temporary, folder / name


def complete(temporary: Path, target: Path) -> None:
    """Give a checkpoint that is written its name.

    Args:
        temporary: The folder that it was written into.
        target: The folder that it becomes.
    """
    _to_disk(temporary)
    temporary.rename(target)
    _to_disk(target.parent)


def _to_disk(folder: Path) -> None:
    """See that names within a folder survive a power failure, where the system can do that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)


def keep_newest(newest: Path, keep: int) -> None:
    """Remove all but some checkpoints; those of later steps were damaged and passed over.

    Args:
        newest: The one that was just completed.
        keep: How many stay, this one included.
    """
    paths = complete_folders(newest.parent)
    place = paths.index(newest)
    for path in [*paths[: max(0, place + 1 - keep)], *paths[place + 1 :]]:
        _remove(path)


def forget_newer(than: Path) -> None:
    """Remove the checkpoints after one, which were damaged and passed over.

    Args:
        than: The one.
    """
    paths = complete_folders(than.parent)
    for path in paths[paths.index(than) + 1 :]:
        _remove(path)


def forget(folder: Path) -> None:
    """Remove all checkpoints, and their folder where nothing else is in it.

    Args:
        folder: Their folder; it need not be there.

    Raises:
        OutputError: If they cannot be removed.
    """
    try:
        for path in complete_folders(folder):
            _remove(path)
        for leftover in folder.glob(".*.tmp"):
            shutil.rmtree(leftover)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise OutputError(f"{folder} cannot be removed ({error.strerror or error}): remove it yourself") from error


def _remove(path: Path) -> None:
    """Take its name first: half a checkpoint is none."""
    if path.is_dir():
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        path.rename(aside)
        shutil.rmtree(aside)
    else:
        path.unlink()


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Say what cannot be written.

    Args:
        target: The checkpoint.

    Raises:
        OutputError: Instead of errors of the system.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{target} cannot be written ({error.strerror or error}); the checkpoints before it are complete: make "
            "room and go on from there"
        ) from error
