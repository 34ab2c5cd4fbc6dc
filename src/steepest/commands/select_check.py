"""`steepest select --check`: fresh models on the subset, on random subsets and on everything, at equal steps."""

import hashlib
import json
import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from steepest._files import write_atomically
from steepest.commands.select_shared import leads
from steepest.errors import SelectionError
from steepest.report.groups import label_of
from steepest.report.measure import LOSS, Measure
from steepest.report.selection_check import ARMS, Arm, Check, CheckRun
from steepest.report.words import count, number
from steepest.selection.result import Selection
from steepest.selection.select import select_subset
from steepest.selection.simple import Random
from steepest.selection.together import Together, attempt
from steepest.training.checkpoint import Keeping
from steepest.training.convert import convert
from steepest.training.data import Splits
from steepest.training.execute import execute
from steepest.training.records import RunRecord
from steepest.training.spec import RunSpec
from steepest.training.stopping import stop_requested
from steepest.training.subsets import Subset
from steepest.training.task import Task

__all__ = ["check_selection"]

_FORMAT = 2
# Apart from the seed that a random selection has by default: its check would draw the same samples.
_FIRST_DRAW = 1000


def check_selection(
    selection: Selection,
    spec: RunSpec,
    task: Task,
    splits: Splits,
    *,
    seeds: int,
    cost: float,
    kept: Path,
    console: Console,
    together: Together | None = None,
) -> Check:
    """Train the models of a check; those that were trained before are not repeated.

    Several processes share every run. Runs of another number of them are repeated: their seconds would be others.

    Args:
        selection: The selection.
        spec: How to train.
        task: The task.
        splits: Its data.
        seeds: How many models of each kind.
        cost: Seconds of the selection, its scorer included.
        kept: File of the runs that are done.
        console: Where progress goes.
        together: The processes that torchrun started, or None.

    Returns:
        The check.
    """
    identity = f"{spec.key()} {_digest(selection)}" + ("" if together is None else f" by {together.ranks.size}")
    with attempt(together):
        runs = _read(kept, identity) if leads(together) else []
    runs = runs if together is None else together.one(runs)
    done = {(run.arm, run.seed) for run in runs}
    wanted: list[tuple[Arm, int]] = [(arm, seed) for seed in range(seeds) for arm in ARMS]
    console.print(f"check: {count(len(wanted), 'run')} of {count(spec.epochs or 0, 'epoch')}", soft_wrap=True)
    measure = _measure(task)
    for place, (arm, seed) in enumerate(wanted, start=1):
        if (arm, seed) in done:
            continue
        run = _run(arm, replace(spec, seed=seed), splits, selection, measure, together)
        runs.append(run)
        content = {"format": _FORMAT, "identity": identity, "runs": [asdict(run) for run in runs]}
        with attempt(together):
            if leads(together):
                write_atomically(kept, json.dumps(content, allow_nan=False) + "\n")
        console.print(f"[{place:>{len(str(len(wanted)))}}/{len(wanted)}] {_line(run, measure)}", soft_wrap=True)
    return Check(
        runs=tuple(run for run in runs if run.seed < seeds),
        method=selection.method,
        kept=len(selection),
        num_samples=selection.num_samples,
        steps=(spec.epochs or 0) * (selection.num_samples // spec.batch_size),
        optimizer=label_of(spec.optimizer),
        measure=measure,
        balanced=selection.labels is not None,
        cost=cost,
    )


def _measure(task: Task) -> Measure:
    if not task.metrics:
        return LOSS
    main = task.metrics[0]
    return Measure(main.name, main.label, main.higher_is_better)


def _run(
    arm: Arm, spec: RunSpec, splits: Splits, selection: Selection, measure: Measure, together: Together | None
) -> CheckRun:
    with attempt(together):
        subset = _subset(arm, spec.seed, splits, selection)
    record = execute(spec, subset=subset) if together is None else _execute_together(spec, subset, together)
    with attempt(together):
        if record.status == "failed":
            raise SelectionError(f"the training on {arm}, seed {spec.seed}, failed: {record.error}")
    if record.status == "diverged" or record.final is None:
        return CheckRun(arm, spec.seed, None, None, record.seconds)
    return CheckRun(arm, spec.seed, record.final.val_loss, record.final.val_metrics.get(measure.name), record.seconds)


def _execute_together(spec: RunSpec, subset: Subset | None, together: Together) -> RunRecord:
    """Make a run that Ctrl-C on one process ends on all before the same step; of such a run nothing is kept."""
    ranks = together.ranks
    with tempfile.TemporaryDirectory() as folder, stop_requested() as stop:

        def stop_on_all() -> bool:
            asked = torch.tensor([stop()], dtype=torch.float32, device=spec.device)
            ranks.sum_([asked])
            if asked.item():
                raise KeyboardInterrupt
            return False

        place = Path(folder)
        keeping = Keeping(checkpoints=place / "checkpoints", model=place / "model.pt", every=math.inf, stop=stop_on_all)
        record = execute(spec, keeping=keeping, subset=subset)
        with together.attempt():
            if stop():  # after the last step
                raise KeyboardInterrupt
    return record


def _subset(arm: Arm, seed: int, splits: Splits, selection: Selection) -> Subset | None:
    if arm == "everything":
        return None
    if arm == "subset":
        return Subset(selection.indices, selection.weights)
    data = (splits.train.inputs, splits.train.targets)
    drawn = select_subset(
        None, data, method=Random(seed=_FIRST_DRAW + seed), count=len(selection), review=False, alone=True
    )
    return Subset(drawn.indices, drawn.weights)


def _digest(selection: Selection) -> str:
    digest = hashlib.sha256(selection.fingerprint.encode())
    digest.update(selection.indices.numpy().tobytes())
    digest.update(selection.weights.numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path, identity: str) -> list[CheckRun]:
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        fits, runs = convert(content["runs"], tuple[CheckRun, ...])
        found = (content["format"], content["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SelectionError(f"{path} cannot be read ({error}): delete it to have its runs repeated") from error
    if not fits or found[0] != _FORMAT:
        raise SelectionError(f"{path} holds no runs of a check: delete it to have them repeated")
    # Of other settings: they say nothing about these.
    return list(runs) if found[1] == identity else []


def _line(run: CheckRun, measure: Measure) -> str:
    parts = [f"{run.arm:<10} seed {run.seed:<3}"]
    if run.val_loss is None:
        parts.append("diverged")
    else:
        parts.append(f"val loss {number(run.val_loss)}")
    if run.val_metric is not None and math.isfinite(run.val_metric):
        parts.append(f"{measure.label} {measure.text(run.val_metric)}")
    return "  ".join([*parts, f"{run.seconds:.2f} s"])
