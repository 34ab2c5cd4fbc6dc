"""Where a selection under way is kept, and what is done about it."""

import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from steepest.distributed.checkpoint.folders import is_checkpoint
from steepest.errors import SelectionError

__all__ = ["Keep", "check_place", "check_writable"]


def _nothing() -> None:
    """What is done before the first checkpoint, by default."""


@dataclass(frozen=True)
class Keep:
    """Where a selection under way is kept, for programs of which it is a part.

    Attributes:
        folder: The folder of its checkpoints; it has nothing else in it.
        every: Seconds between two of them.
        of: Name of the selection; a checkpoint of another name is thrown away without a word.
        say: Told, on the first process, what is damaged or begun anew; None is a warning.
        resumed: Told the seconds that were spent before an interruption; the same on all processes.
        before: Called, on all processes, before the first checkpoint is written.
        stop: Whether this process was asked to stop; several then do where they meet, with a checkpoint.
        replaceable: Whether a checkpoint that is of something else, or that is damaged, is thrown away and the
            selection begun anew.
        worth: Seconds that the passes must have taken for a checkpoint before the choice.
        stays: Whether the last checkpoint stays when the selection is done, for somebody else to remove.
    """

    folder: Path
    every: float = 30.0
    of: str = ""
    say: Callable[[str], None] | None = None
    resumed: Callable[[float], None] | None = None
    before: Callable[[], None] = _nothing
    stop: Callable[[], bool] | None = None
    replaceable: bool = False
    worth: float = 0.0
    stays: bool = False


def check_writable(folder: Path) -> None:
    """Refuse a place that is nowhere, or that cannot be written to.

    Args:
        folder: The folder, which need not be there.

    Raises:
        SelectionError: If it is in no folder, or cannot be written.
    """
    parent = folder.absolute().parent
    if not parent.is_dir() or not os.access(folder if folder.is_dir() else parent, os.W_OK):
        raise SelectionError(
            f"checkpoint={str(folder)!r} cannot be written: name a folder of its own, within one that can be."
        )


def check_place(folder: Path) -> None:
    """Refuse what cannot be a folder of checkpoints, and what earlier versions left there.

    Args:
        folder: The folder, which need not be there.

    Raises:
        SelectionError: If it is a file, or has something else in it.
    """
    parent = folder.absolute().parent
    beside = parent.glob(f"{glob.escape(folder.name)}.*-of-*")
    old = [file for file in beside if re.search(r"\.\d+-of-\d+$", file.name)]
    for file in [folder, *sorted(old)]:
        if file.is_file():
            raise SelectionError(
                f"{file} is a file, as earlier versions kept a selection under way, and this steepest keeps a folder: "
                "finish the selection with the version that began it, or delete it to begin anew."
            )
    strangers = sorted(path.name for path in folder.iterdir() if not is_checkpoint(path)) if folder.is_dir() else []
    if strangers:
        raise SelectionError(
            f"checkpoint={str(folder)!r} is a folder with other things in it ({', '.join(strangers[:3])}): name a "
            "folder of its own, which need not be there."
        )
