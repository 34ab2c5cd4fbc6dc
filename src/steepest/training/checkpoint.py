"""Checkpoints of a run: everything it is made of, in folders that are either complete or not there.

A run that is continued from a checkpoint on the same machine, with the same versions, ends with the numbers of
the run that was never stopped, bit for bit: model, optimizer, random generators, the place in the epoch and the
losses so far are all in it, and the subset that is trained on. A selection under way has checkpoints of its own, in the
folder `selection` beside them: it is gone on with from the newest of them, by any number of processes.

A checkpoint is a folder such as `step-00000120`. Its tensors are written by torch.distributed.checkpoint under names
such as `model.0.weight` and `optimizer.state.0.weight.exp_avg`; `manifest.json` has everything else, and size and
SHA-256 of every file. Nothing in it is trusted when it is read, and none of it is run.

Several processes: each writes a part and reads what it needs. The folder does not depend on their number, but for the
random generators: of these there is one for every process, and with another number of processes all begin anew, as
they would in a new run.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steepest.distributed import Ranks
from steepest.distributed.checkpoint.advice import advised
from steepest.distributed.checkpoint.folders import complete_folders
from steepest.distributed.checkpoint.manifest import FORMAT, read_manifest
from steepest.distributed.checkpoint.together import choose, lead, write_checkpoint
from steepest.distributed.checkpoint.tree import blank, leaves, pack, unpack
from steepest.distributed.contact import LostRankError, contact
from steepest.training.checkpoints.generators import generator_states, how_many, set_generators
from steepest.training.checkpoints.identity import check_same_run, identity
from steepest.training.checkpoints.keeping import Keeping
from steepest.training.checkpoints.names import by_name, by_number
from steepest.training.checkpoints.old import forget, refuse_old_files
from steepest.training.checkpoints.selections import Selections
from steepest.training.convert import convert, plain
from steepest.training.errors import CheckpointError, DamagedCheckpointError
from steepest.training.loop import Progress, Trainer
from steepest.training.subsets import Subset

__all__ = ["Checkpoints", "Keeping", "any_checkpoint", "forget", "saved_settings"]

_ADVICE = "begin anew with --fresh"


class Checkpoints:
    """Writes checkpoints of one run and puts the run back to where the last one was.

    Args:
        trainer: The run.
        keeping: Where to and how often.
    """

    def __init__(self, trainer: Trainer, keeping: Keeping) -> None:
        self._trainer, self._keeping = trainer, keeping
        self._last = time.monotonic()
        trainer.ask = self._asked
        self._run = identity(trainer.spec)
        self._selections = Selections(trainer, keeping, self.save)
        if trainer.spec.select is not None:
            trainer.keep = self._selections.keep()

    def settle(self) -> None:
        """Put on the clock what a selection had taken before an interruption."""
        self._selections.settle()

    def before_step(self) -> None:
        """Write a checkpoint if it is time to or the run is to stop.

        Raises:
            KeyboardInterrupt: After writing, if the run is to stop.
        """
        self.settle()
        stop, due = self._trainer.asked or self._agreed(*self._asked())
        if stop or due:
            self.save()
        if stop:
            raise KeyboardInterrupt

    def _asked(self) -> tuple[bool, bool]:
        """Whether this process is to stop, and whether it is time to write."""
        return self._keeping.stop(), time.monotonic() - self._last >= self._keeping.every

    def _agreed(self, stop: bool, due: bool) -> tuple[bool, bool]:
        """What any process was asked for, all do before the same step."""
        ranks = self._trainer.ranks
        if ranks is None:
            return stop, due
        asked = torch.tensor([stop, due], dtype=torch.float32, device=self._trainer.spec.device)
        ranks.sum_([asked])
        return bool(asked[0] > 0), bool(asked[1] > 0)

    def save(self) -> None:
        """Write a checkpoint; those before it stay beside it, as many as are kept."""
        trainer, tensors = self._trainer, dict[str, Tensor]()
        optimizer = by_name(trainer.optimizer, trainer.model)
        state = {
            "progress": pack(plain(asdict(trainer.progress)), "progress", tensors),
            "subset": pack(None if trainer.subset is None else vars(trainer.subset), "subset", tensors),
            "model": pack(trainer.model.state_dict(), "model", tensors),
            "optimizer": pack(optimizer, "optimizer", tensors),
        }
        self._leave_buffers_to_the_first(tensors)
        content = {
            "format": FORMAT,
            **self._run,
            "settings": self._keeping.settings,
            "processes": 1 if trainer.ranks is None else trainer.ranks.size,
            "generators": how_many(trainer.ranks),
            "state": state,
        }
        write_checkpoint(
            self._keeping.checkpoints,
            trainer.progress.steps,
            self._keeping.keep,
            {**tensors, **generator_states(trainer.ranks)},
            content,
            trainer.ranks,
        )
        self._last = time.monotonic()
        self._selections.saved()

    def _leave_buffers_to_the_first(self, tensors: dict[str, Tensor]) -> None:
        """Running statistics are each process's own, and evaluations use those of the first."""
        ranks, model = self._trainer.ranks, self._trainer.model
        if ranks is None or ranks.rank == 0:
            return
        alike = {f"model.{name}" for name, _ in model.named_parameters(remove_duplicate=False)}
        for key in [key for key in tensors if key.startswith("model.") and key not in alike]:
            del tensors[key]

    def restore(self) -> None:
        """Put model, optimizer, generators and progress back to the newest checkpoint, if there is one.

        Raises:
            CheckpointError: If all are damaged, or it is of another run, model or version.
            LostRankError: If another process is gone.
        """
        trainer, model = self._trainer, self._trainer.model
        folder = self._keeping.checkpoints
        with advised(_ADVICE):
            lead(trainer.ranks, lambda: refuse_old_files(folder))
            chosen = choose(folder, trainer.ranks, self._keeping.say)
        if chosen is None:
            return
        path, content = chosen
        tree = content["state"]
        check_same_run(path, content, self._run)
        fits, progress = convert(unpack(tree["progress"], {}), Progress)
        if not fits:
            raise CheckpointError(f"{path} has no usable progress in it; begin anew with --fresh")
        tensors = {leaf["key"]: blank(leaf) for name in ("optimizer", "subset") for leaf in leaves(tree[name])}
        generators = generator_states(trainer.ranks) if content["generators"] == how_many(trainer.ranks) else {}
        try:
            tensors |= _places(tree["model"], model.state_dict())
            optimizer = by_number(unpack(tree["optimizer"], tensors), trainer.optimizer, model)
            _read(path, {**tensors, **generators}, trainer.ranks)
            model.load_state_dict(unpack(tree["model"], tensors))
            trainer.optimizer.load_state_dict(optimizer)
        except LostRankError:
            raise
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{path} does not fit the model of this run: {reason}; begin anew with --fresh"
            ) from error
        trainer.progress = progress
        subset = unpack(tree["subset"], tensors)
        trainer.subset = None if subset is None else Subset(**subset)
        set_generators(generators)
        self._last = time.monotonic()
        self._selections.saved()


def _places(tree: dict[str, Any], own: dict[str, Any]) -> dict[str, Tensor]:
    """Where the tensors of a model are read to: into the model itself."""
    then = {name: leaf["shape"] for name, entry in tree.items() for leaf in leaves(entry)}
    now = {name: list(entry.shape) for name, entry in own.items() if isinstance(entry, Tensor)}
    for name in [*then, *(name for name in now if name not in then)]:
        if then.get(name) != now.get(name):
            was, is_ = then.get(name, "missing"), now.get(name, "missing")
            raise ValueError(f"{name} was {was} and is {is_}")
    return {leaf["key"]: own[name] for name, entry in tree.items() for leaf in leaves(entry)}


def _read(path: Path, into: dict[str, Tensor], ranks: Ranks | None) -> None:
    from steepest.distributed.checkpoint.tensors import read_tensors

    with contact(), advised(_ADVICE):
        read_tensors(path, into, ranks)


def any_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, damaged or not.

    Args:
        folder: The folder of a run's checkpoints.

    Returns:
        Its folder; None if there is none.

    Raises:
        CheckpointError: If there is one of an earlier version.
    """
    refuse_old_files(folder)
    return next(reversed(complete_folders(folder)), None)


def saved_settings(folder: Path) -> str:
    """What the user had asked for when the newest checkpoint was written whose manifest can be read.

    Args:
        folder: The folder of a run's checkpoints.

    Returns:
        JSON.

    Raises:
        DamagedCheckpointError: If there is none.
    """
    problems = []
    with advised(_ADVICE):
        for path in reversed(complete_folders(folder)):
            try:
                return str(read_manifest(path)["settings"])
            except DamagedCheckpointError as error:
                problems.append(str(error))
        raise DamagedCheckpointError("; ".join(problems) or f"{folder} is empty")
