"""A small tuning grid: the same number of trials for every optimizer, chosen by validation loss only.

The trials run on seeds of their own, so that the seeds that are reported took no part in the choice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from steepest.errors import InvalidOptionError
from steepest.training.records import RunRecord
from steepest.training.registry import get_optimizer
from steepest.training.spec import RunSpec
from steepest.training.tuned import NOT_TUNED

__all__ = ["TUNING_SEEDS", "Choice", "apply_choices", "choose", "log_grid", "tuning_runs"]

# Three: with one, a rate at the edge of divergence that was lucky once is chosen too often.
TUNING_SEEDS = (1000, 1001, 1002)


@dataclass(frozen=True)
class Choice:
    """What tuning chose for one optimizer on one task.

    Attributes:
        task: Name of the task.
        optimizer: Name of the optimizer.
        batch_size: Samples per step.
        lr: The learning rate, None if no trial finished.
        val_loss: Its mean validation loss over the finished tuning seeds.
        finished: Runs that finished.
        runs: Runs that were made: trials times tuning seeds.
    """

    task: str
    optimizer: str
    batch_size: int
    lr: float | None
    val_loss: float | None
    finished: int
    runs: int


def log_grid(low: float, high: float, count: int) -> list[float]:
    """Numbers at equal ratios, ends included, to three significant digits.

    Args:
        low: First number.
        high: Last number.
        count: How many; one gives the geometric mean.

    Returns:
        The grid.

    Example:
        >>> log_grid(0.001, 1.0, 4)
        [0.001, 0.01, 0.1, 1.0]
    """
    if count == 1:
        return [float(f"{math.sqrt(low * high):.3g}")]
    ratio = (high / low) ** (1 / (count - 1))
    return [float(f"{low * ratio**step:.3g}") for step in range(count)]


def tuning_runs(specs: Sequence[RunSpec], trials: int) -> list[RunSpec]:
    """The runs that try out learning rates for a plan.

    Args:
        specs: The plan.
        trials: Learning rates per task and optimizer, from the entry's range.

    Returns:
        The plan's runs at every tuning seed with every learning rate of the grid; on all of the data, once for all
        that is selected.

    Raises:
        InvalidOptionError: If the number of trials is not positive or the plan reports a tuning seed.
    """
    if trials < 1:
        raise InvalidOptionError(f"{trials} tuning trials: at least 1 is needed")
    if any(spec.seed in TUNING_SEEDS for spec in specs):
        raise InvalidOptionError(f"seeds {TUNING_SEEDS} are for tuning and cannot be reported: use other seeds")
    cells = {(spec.task, spec.optimizer, spec.batch_size): spec for spec in specs}
    return [
        replace(spec, select=None, seed=seed, options={**spec.options, "lr": lr})
        for spec in cells.values()
        for lr in log_grid(*get_optimizer(spec.optimizer).lr_range, trials)
        for seed in TUNING_SEEDS
    ]


def choose(records: Sequence[RunRecord]) -> list[Choice]:
    """Take the learning rate with the smallest mean validation loss at the end of training.

    Rates that finished on more of the tuning seeds come first: one that diverges on a seed is not chosen while
    another finishes on all.

    Args:
        records: Records of the tuning runs.

    Returns:
        One choice per task and optimizer.
    """
    cells: dict[tuple[str, str, int], list[RunRecord]] = {}
    for record in records:
        cells.setdefault((record.task, record.optimizer, record.batch_size), []).append(record)
    return [_choose_one(*cell, runs) for cell, runs in cells.items()]


def _choose_one(task: str, optimizer: str, batch_size: int, runs: Sequence[RunRecord]) -> Choice:
    losses: dict[float, list[float]] = {}
    for record in runs:
        if record.status == "finished" and record.final is not None and record.final.val_loss is not None:
            losses.setdefault(float(str(record.options["lr"])), []).append(record.final.val_loss)
    ranked = sorted((-len(found), fmean(found), lr) for lr, found in losses.items())
    _, val_loss, lr = ranked[0] if ranked else (0, None, None)
    return Choice(task, optimizer, batch_size, lr, val_loss, sum(map(len, losses.values())), len(runs))


def apply_choices(specs: Sequence[RunSpec], choices: Sequence[Choice]) -> list[RunSpec]:
    """Put the chosen learning rates into a plan; where no trial finished the plan's own one stays.

    Args:
        specs: The plan.
        choices: What tuning chose.

    Returns:
        The new plan.
    """
    chosen = {(choice.task, choice.optimizer, choice.batch_size): choice for choice in choices}
    # Told of all runs alike, where some select: their learning rates are the same ones.
    on = " on all of the data" if any(spec.select is not None for spec in specs) else ""

    def tuned(spec: RunSpec) -> RunSpec:
        choice = chosen.get((spec.task, spec.optimizer, spec.batch_size))
        if choice is None or choice.lr is None:
            return spec
        trials = choice.runs // len(TUNING_SEEDS)
        rates = "1 rate" if trials == 1 else f"{trials} rates"
        source = f"learning rate: best of {rates} x {len(TUNING_SEEDS)} other seeds by validation loss{on}, in this "
        source += f"comparison{_rest(spec.options_source)}"
        return replace(spec, options={**spec.options, "lr": choice.lr}, options_source=source)

    return [tuned(spec) for spec in specs]


def _rest(source: str) -> str:
    """How the options beside the learning rate were chosen: what is said of a stored rate no longer holds."""
    first, *others = source.split("; ")
    if first == NOT_TUNED:
        first = "all else by default"
    elif first.startswith("learning rate"):
        first = ""
    else:
        first = f"all else: {first}"
    return "".join(f"; {part}" for part in (first, *others) if part)
