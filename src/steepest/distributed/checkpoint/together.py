"""Writing and choosing a checkpoint with all ranks: what fails on one fails on all, and all read the same one."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor

from steepest.distributed import Ranks
from steepest.distributed.agreement import tell
from steepest.distributed.checkpoint.folders import (
    begin,
    complete,
    complete_folders,
    keep_newest,
    writing,
)
from steepest.distributed.checkpoint.manifest import check_files, check_tensors, read_manifest, write_manifest
from steepest.distributed.ranks import RankError
from steepest.errors import CheckpointError, DamagedCheckpointError, OutputError

__all__ = ["choose", "each", "lead", "write_checkpoint"]

T = TypeVar("T")


def write_checkpoint(
    folder: Path, steps: int, keep: int, tensors: Mapping[str, Tensor], content: Mapping[str, Any], ranks: Ranks | None
) -> Path:
    """Write a checkpoint that is complete or not there. All ranks must come here.

    Args:
        folder: The folder of the checkpoints.
        steps: Number of the checkpoint, by which the newest is known.
        keep: How many checkpoints stay.
        tensors: What this rank has.
        content: The manifest but for the list of files; the first rank's is taken.
        ranks: The ranks; None for one process alone.

    Returns:
        The checkpoint.

    Raises:
        OutputError: On all ranks, if it cannot be written on one.
    """
    from steepest.distributed.checkpoint.tensors import write_tensors

    leads = ranks is None or ranks.rank == 0
    temporary: Path | None = None
    try:
        temporary, target = _first(ranks, lambda: _begun(folder, steps))

        def write() -> dict[str, tuple[int, str]]:
            with writing(target):
                return write_tensors(temporary, tensors, ranks)

        def finish() -> Path:
            files = {name: entry for part in parts for name, entry in sorted(part.items())}
            with writing(target):
                write_manifest(temporary, {**content, "files": files})
                complete(temporary, target)
                keep_newest(target, keep)
            return target

        parts = each(ranks, write)
        return _first(ranks, finish)
    except RankError as error:
        raise OutputError(str(error)) from error
    finally:
        if leads and temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _begun(folder: Path, steps: int) -> tuple[Path, Path]:
    with writing(folder):
        return begin(folder, steps)


def choose(folder: Path, ranks: Ranks | None, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Find the newest checkpoint that is as it was written. All ranks must come here; each reads a part of the files.

    Args:
        folder: The folder of the checkpoints.
        ranks: The ranks; None for one process alone.
        say: Told what is damaged, and what is used instead.

    Returns:
        The checkpoint and its manifest; None if there is none, damaged or not.

    Raises:
        DamagedCheckpointError: If all are damaged.
        CheckpointError: If one is of another version.
    """
    try:
        paths = _first(ranks, lambda: complete_folders(folder))
        problems: list[str] = []
        for path in reversed(paths):
            content, found = _examined(path, ranks)
            if content is not None and not found:
                if problems:
                    say(f"{'; '.join(problems)}: going on from the one before, {path}")
                return path, content
            problems += found[:1]
    except RankError as error:
        raise CheckpointError(str(error)) from error
    if problems:
        raise DamagedCheckpointError(f"{'; '.join(problems)}")
    return None


def _examined(path: Path, ranks: Ranks | None) -> tuple[dict[str, Any] | None, list[str]]:
    """The manifest, and what is wrong with the checkpoint, the same on every rank."""
    content, problem = _first(ranks, lambda: _manifest(path))
    if content is None:
        return None, [problem]
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    files = dict(list(content["files"].items())[rank::size])

    def check() -> str:
        try:
            check_files(path, files)
            if rank == 0:
                check_tensors(path, content)
        except DamagedCheckpointError as error:
            return str(error)
        return ""

    return content, [found for found in each(ranks, check) if found]


def _manifest(path: Path) -> tuple[dict[str, Any] | None, str]:
    try:
        return read_manifest(path), ""
    except DamagedCheckpointError as error:
        return None, str(error)


def lead(ranks: Ranks | None, work: Callable[[], T]) -> T:
    """Let the first rank do something, and all fail where it does. All ranks must come here.

    Args:
        ranks: The ranks; None for one process alone.
        work: What to do; what it returns must be small and picklable.

    Returns:
        What it returned.

    Raises:
        CheckpointError: On the others, if it failed.
    """
    try:
        return _first(ranks, work)
    except RankError as error:
        raise CheckpointError(str(error)) from error


def each(ranks: Ranks | None, work: Callable[[], T]) -> list[T]:
    """Let every rank do something, and all fail where one does. All ranks must come here.

    Args:
        ranks: The ranks; None for one process alone.
        work: What to do; what it returns must be small and picklable.

    Returns:
        What it returned on every rank.
    """
    if ranks is None:
        return [work()]
    try:
        done = work()
    except Exception as error:
        return tell(ranks, None, error)
    return tell(ranks, done, None)


def _first(ranks: Ranks | None, work: Callable[[], T]) -> T:
    """What the work gave on the first rank, where alone it is done."""
    if ranks is None:
        return work()
    return cast("T", each(ranks, lambda: work() if ranks.rank == 0 else None)[0])
