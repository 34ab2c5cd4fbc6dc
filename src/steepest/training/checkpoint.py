"""Checkpoints of a run: everything it is made of, in one file that is either complete or absent.

A run that is continued from a checkpoint on the same machine, with the same versions, ends with the numbers of
the run that was never stopped, bit for bit: model, optimizer, random generators, the place in the epoch and the
losses so far are all in it, and the subset that is trained on. A selection that was under way is made again.

On several processes the first one writes, and all of them read. The file does not depend on their number, but for the
random generators: of these there is one for every process, and with another number of processes all begin anew.
"""

import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steepest._versions import package_version
from steepest.training.convert import convert, plain
from steepest.training.errors import CheckpointError, DamagedCheckpointError, OutputError
from steepest.training.loop import Progress, Trainer
from steepest.training.spec import RunSpec
from steepest.training.subsets import Subset
from steepest.training.trained import write_tensors

__all__ = ["Checkpoints", "Keeping", "forget", "latest", "read_checkpoint", "saved_settings"]

_FORMAT = 3


@dataclass(frozen=True)
class Keeping:
    """What a run keeps on disk beside its record.

    Attributes:
        checkpoint: File of the checkpoint.
        model: File of the trained model.
        settings: What the user asked for, as JSON, to be found again on resuming.
        every: Seconds of wall-clock time between two checkpoints.
        stop: Whether the run should stop before its next step; it then writes a checkpoint and raises
            KeyboardInterrupt.
        say: Told where a damaged checkpoint was passed over for the one before it.
    """

    checkpoint: Path
    model: Path
    settings: str = "{}"
    every: float = 30.0
    stop: Callable[[], bool] = field(default=lambda: False)
    say: Callable[[str], None] = field(default=lambda _: None)


class Checkpoints:
    """Writes checkpoints of one run and puts the run back to where the last one was.

    Args:
        trainer: The run.
        keeping: Where to and how often.
    """

    def __init__(self, trainer: Trainer, keeping: Keeping) -> None:
        self._trainer, self._keeping = trainer, keeping
        self._last = time.monotonic()

    def before_step(self) -> None:
        """Write a checkpoint if it is time to or the run is to stop.

        Raises:
            KeyboardInterrupt: After writing, if the run is to stop.
        """
        stop, due = self._agreed(self._keeping.stop(), time.monotonic() - self._last >= self._keeping.every)
        if stop or due:
            self.save()
        if stop:
            raise KeyboardInterrupt

    def _agreed(self, stop: bool, due: bool) -> tuple[bool, bool]:
        """What any process was asked for, all do before the same step."""
        ranks = self._trainer.ranks
        if ranks is None:
            return stop, due
        asked = torch.tensor([stop, due], dtype=torch.float32, device=self._trainer.spec.device)
        ranks.sum_([asked])
        return bool(asked[0] > 0), bool(asked[1] > 0)

    def save(self) -> None:
        """Write the checkpoint; the one before it stays beside it, until the next."""
        trainer, ranks = self._trainer, self._trainer.ranks
        generators = [torch.get_rng_state()] if ranks is None else ranks.gather_objects(torch.get_rng_state())
        on_cuda = torch.cuda.is_available()
        cuda = torch.cuda.get_rng_state_all() if on_cuda else []
        if ranks is not None and on_cuda:  # of each process's own device
            cuda = ranks.gather_objects(torch.cuda.get_rng_state())
        content = {
            "format": _FORMAT,
            "versions": _versions(),
            "settings": self._keeping.settings,
            "run": _description(trainer.spec),
            "key": trainer.spec.key(),
            "model": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "progress": plain(asdict(trainer.progress)),
            "subset": None if trainer.subset is None else vars(trainer.subset),
            "generators": generators,
            "cuda_generators": cuda,
        }
        error: Exception | None = None
        try:
            if ranks is None or ranks.rank == 0:
                _keep_previous(self._keeping.checkpoint)
                write_tensors(self._keeping.checkpoint, content)
        except OutputError as failure:
            error = failure
        if ranks is not None:
            ranks.agree(error)
        elif error is not None:
            raise error
        self._last = time.monotonic()

    def restore(self) -> None:
        """Put model, optimizer, generators and progress back to the checkpoint, if there is one.

        Raises:
            CheckpointError: If it is damaged, or of another run, model or version.
        """
        path, trainer = self._keeping.checkpoint, self._trainer
        if not path.exists():
            return
        path, content = latest(path, self._keeping.say)
        _check_same_run(path, content, trainer.spec)
        try:
            trainer.model.load_state_dict(content["model"])
            trainer.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{path} does not fit the model of this run: {reason}; begin anew with --fresh"
            ) from error
        fits, progress = convert(content["progress"], Progress)
        if not fits:
            raise CheckpointError(f"{path} has no usable progress in it; begin anew with --fresh")
        trainer.progress = progress
        trainer.subset = None if content["subset"] is None else Subset(**content["subset"])
        self._restore_generators(content["generators"], content["cuda_generators"])

    def _restore_generators(self, generators: list[Tensor], cuda: list[Tensor]) -> None:
        ranks = self._trainer.ranks
        if len(generators) != (1 if ranks is None else ranks.size):
            return
        torch.set_rng_state(generators[0 if ranks is None else ranks.rank])
        if cuda and ranks is None:
            torch.cuda.set_rng_state_all(cuda)
        elif cuda and ranks is not None:
            torch.cuda.set_rng_state(cuda[ranks.rank])


def latest(path: Path, say: Callable[[str], None] = lambda _: None) -> tuple[Path, dict[str, Any]]:
    """Read a checkpoint, or the one before it if it is damaged.

    Args:
        path: The checkpoint.
        say: Told what is damaged, if something is.

    Returns:
        The file that was read, and its content.

    Raises:
        DamagedCheckpointError: If it is damaged and there is none before it, or that one is damaged too.
    """
    try:
        return path, read_checkpoint(path)
    except DamagedCheckpointError as error:
        previous = _previous(path)
        if not previous.exists():
            raise
        content = read_checkpoint(previous)
        say(f"{str(error).partition(';')[0]}: going on from the one before it, {previous}")
        return previous, content


def forget(path: Path) -> None:
    """Remove a checkpoint and the one before it."""
    path.unlink(missing_ok=True)
    _previous(path).unlink(missing_ok=True)


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _keep_previous(path: Path) -> None:
    """Give the checkpoint a second name, under which it stays when the first is written anew."""
    if not path.is_file():
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(path, aside)
        except OSError:  # a file system without links
            shutil.copyfile(path, aside)
        aside.replace(_previous(path))
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OutputError(
            f"{_previous(path)} cannot be written ({error.strerror or error}); {path} is complete: make room and go on"
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint file and check that it is one of this format.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        DamagedCheckpointError: If it cannot be read.
        CheckpointError: If it is no checkpoint of this version.
    """
    remedy = "begin anew with --fresh"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise DamagedCheckpointError(f"{path} is damaged in {damaged}; {remedy}")
        content = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:160]
        raise DamagedCheckpointError(f"{path} cannot be read as a checkpoint ({reason}); {remedy}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} has checkpoint format {found!r}, this steepest reads {_FORMAT}; {remedy}")
    return content


def saved_settings(path: Path) -> str:
    """What the user had asked for when the checkpoint was written.

    Args:
        path: The checkpoint.

    Returns:
        JSON.
    """
    return str(latest(path)[1]["settings"])


def _versions() -> dict[str, str]:
    return {name: package_version(name) for name in ("steepest", "torch")}


def _description(spec: RunSpec) -> dict[str, object]:
    """The run in plain words, to tell what differs."""
    content = {name: plain(getattr(spec, name)) for name in spec.__dataclass_fields__}
    del content["options_source"], content["untuned"]
    content["source"] = plain(spec.origin().identity())
    return content


def _check_same_run(path: Path, content: dict[str, Any], spec: RunSpec) -> None:
    versions = _versions()
    for name, version in content["versions"].items():
        if versions.get(name) != version:
            raise CheckpointError(
                f"{path} was written with {name} {version}, this is {name} {versions.get(name)}, and another version "
                "does not continue the same run; go on with that version or begin anew with --fresh"
            )
    if content["key"] == spec.key():
        return
    now, then = _description(spec), content["run"]
    changed = [f"{name} was {then.get(name)!r} and is {now[name]!r}" for name in now if then.get(name) != now[name]]
    raise CheckpointError(
        f"{path} is of another run: {'; '.join(changed) or 'its key differs'}; "
        "resume with the same settings, begin anew with --fresh, or use another --out"
    )
