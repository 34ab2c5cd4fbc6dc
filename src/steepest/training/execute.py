"""Make one run and its record, whatever happens in it."""

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial

import torch
from torch import nn

from steepest.distributed import Ranks
from steepest.errors import NonFiniteError
from steepest.training.checkpoint import Checkpoints, Keeping
from steepest.training.convert import plain
from steepest.training.data import Split, Splits, epoch_order
from steepest.training.environment import environment_row
from steepest.training.errors import CheckpointError, OutputError
from steepest.training.evaluate import evaluate
from steepest.training.loop import DivergedError, Trainer
from steepest.training.memory import memory_kind, peak_memory
from steepest.training.optimizer import OptimizerEntry
from steepest.training.records import (
    SCHEMA,
    EpochPoint,
    Final,
    MetricNote,
    Problem,
    RunRecord,
    Selected,
    Status,
    finite,
)
from steepest.training.registry import get_optimizer
from steepest.training.source import resolve
from steepest.training.spec import RunSpec
from steepest.training.subsets import Subset
from steepest.training.task import Task
from steepest.training.trained import save_model

__all__ = ["Outcome", "execute", "make_record"]

# A run whose final validation loss is above this multiple of the untrained one counts as diverged.
_DIVERGED_RATIO = 10.0
_TRIAL_STEPS = 3
_RANK_STRIDE = 7_919  # between the seeds of processes that share a run


@dataclass
class Outcome:
    """What came out of a run, filled in as it goes."""

    status: Status = "failed"
    error: str | None = None
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    history: list[EpochPoint] = field(default_factory=list)
    selections: list[Selected] = field(default_factory=list)
    final: Final | None = None
    seconds: float = 0.0
    steps: int = 0
    peak_memory: int | None = None
    memory_kind: str = "not measured"
    num_parameters: int | None = None
    samples: tuple[int, int, int] | None = None
    fingerprint: str | None = None


def make_record(spec: RunSpec, outcome: Outcome, environment: dict[str, str | int | None]) -> RunRecord:
    """Join what was asked for and what came out.

    Args:
        spec: The run.
        outcome: What came out of it.
        environment: Where it was made.

    Returns:
        The record.
    """
    return RunRecord(
        schema=SCHEMA,
        key=spec.key(),
        task=spec.task,
        problem=_problem(spec),
        optimizer=spec.optimizer,
        options={name: plain(value) for name, value in spec.options.items()},
        options_source=spec.options_source,
        seed=spec.seed,
        data_seed=spec.data_seed,
        epochs=spec.epochs,
        budget_seconds=spec.seconds,
        schedule=spec.schedule,
        batch_size=spec.batch_size,
        select=spec.select,
        environment=environment,
        **{**vars(outcome), "history": tuple(outcome.history), "selections": tuple(outcome.selections)},
    )


def _problem(spec: RunSpec) -> Problem:
    source = spec.origin()
    task = resolve(source)
    metrics = tuple(MetricNote(metric.name, metric.label, metric.higher_is_better) for metric in task.metrics)
    return Problem(task.description, task.kind, task.loss.name, metrics, source.model, task.notes, source.digest)


def execute(
    spec: RunSpec,
    on_epoch: Callable[[EpochPoint], None] = lambda _point: None,
    *,
    own_process: bool = False,
    keeping: Keeping | None = None,
    subset: Subset | None = None,
) -> RunRecord:
    """Make a run; errors in it become part of the record.

    Args:
        spec: The run.
        on_epoch: Called with every new point of the history.
        own_process: Whether this process exists for this run alone; memory is measured only then.
        keeping: Where checkpoints and the trained model go; a checkpoint that is there is continued from.
        subset: What is trained on from the first step on, with as many steps as all of the data would have; for
            subsets that were chosen before. The run's key knows nothing of it.

    Returns:
        The record.

    Raises:
        CheckpointError: If there is a checkpoint that cannot be continued from.
        OutputError: If a checkpoint or the model cannot be written.
    """
    threads = torch.get_num_threads()
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    outcome = Outcome()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            _run(spec, outcome, on_epoch, own_process=own_process, keeping=keeping, subset=subset)
    except (DivergedError, NonFiniteError) as error:
        outcome.status, outcome.error = "diverged", str(error)
    except (CheckpointError, OutputError):
        raise
    except Exception as error:
        outcome.status, outcome.error = "failed", f"{type(error).__name__}: {error}"
    finally:
        environment = environment_row(spec.device)
        ranks = Ranks.current()
        if ranks is not None:
            environment["processes"] = ranks.size
        torch.set_num_threads(threads)
    return make_record(spec, outcome, environment)


def _run(
    spec: RunSpec,
    outcome: Outcome,
    on_epoch: Callable[[EpochPoint], None],
    *,
    own_process: bool,
    keeping: Keeping | None,
    subset: Subset | None,
) -> None:
    task, entry = resolve(spec.origin()), get_optimizer(spec.optimizer)
    splits = task.load(spec.data_seed)
    shape = splits.shape
    splits = splits.to(spec.device)
    outcome.samples = (len(splits.train), len(splits.val), len(splits.test))
    if entry.full_batch:  # the record keeps the batch size of those that it is compared with
        spec = replace(spec, batch_size=len(splits.train))
    torch.manual_seed(spec.seed)
    model = task.model(shape).to(spec.device)
    outcome.num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    outcome.fingerprint = _fingerprint(model, spec, len(splits.train))
    trial = partial(_try_out, spec, task, entry, model, splits.train)
    # Libraries set themselves up on first use, and that is no optimizer's cost: a warm-up comes first.
    trial()
    if own_process:
        outcome.peak_memory = peak_memory(spec.device, trial)
        outcome.memory_kind = memory_kind(spec.device)
    torch.manual_seed(spec.seed)
    ranks = Ranks.current()
    trainer = Trainer(spec, task, entry, model, entry.build(model, spec.options), splits, subset=subset, ranks=ranks)
    if ranks is not None:  # the models begin alike, what is drawn in training, such as dropout, must not be
        torch.manual_seed(spec.seed + _RANK_STRIDE * ranks.rank)
    try:
        _train(trainer, on_epoch, keeping)
    finally:
        progress = trainer.progress
        outcome.history, outcome.steps, outcome.seconds = progress.history, progress.steps, progress.seconds
        outcome.selections = progress.selections
    outcome.final = _final(task, model, splits)
    outcome.status, outcome.error = _judge(progress.history[0].val_loss, outcome.final)
    if keeping is not None and (ranks is None or ranks.rank == 0):
        save_model(keeping.model, spec, task, model, splits)


def _train(trainer: Trainer, on_epoch: Callable[[EpochPoint], None], keeping: Keeping | None) -> None:
    if keeping is None:
        trainer.run(on_epoch)
        return
    checkpoints = Checkpoints(trainer, keeping)
    checkpoints.restore()
    trainer.run(on_epoch, checkpoints.before_step)
    checkpoints.settle()


def _try_out(spec: RunSpec, task: Task, entry: OptimizerEntry, model: nn.Module, train: Split) -> None:
    """A few steps on a copy of the model."""
    scratch = copy.deepcopy(model)
    optimizer, step = entry.build(scratch, spec.options), entry.step(spec.options)
    size = spec.batch_size
    for _ in range(_TRIAL_STEPS):
        step(optimizer, scratch, task.loss, train.inputs[:size], train.targets[:size])


def _fingerprint(model: nn.Module, spec: RunSpec, num_samples: int) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    digest.update(epoch_order(num_samples, seed=spec.seed, epoch=1).numpy().tobytes())
    return digest.hexdigest()[:16]


def _final(task: Task, model: nn.Module, splits: Splits) -> Final:
    val, test = evaluate(task, model, splits.val), evaluate(task, model, splits.test)
    return Final(finite(val.loss), finite(test.loss), val.metrics, test.metrics)


def _judge(untrained: float | None, final: Final) -> tuple[Status, str | None]:
    limit = _DIVERGED_RATIO * (untrained if untrained is not None else math.inf)
    if final.val_loss is None:
        return "diverged", "the final validation loss is not finite"
    if final.val_loss > limit:
        return "diverged", f"the final validation loss {final.val_loss:.3g} is above 10x the untrained one"
    return "finished", None
