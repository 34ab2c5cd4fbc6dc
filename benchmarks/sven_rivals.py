"""Sven and its rivals on the four problems of its paper (arXiv 2604.01279), 20 epochs, by `steepest compare`.

    STEEPEST_DATA=... python benchmarks/sven_rivals.py [toy_1d polynomial mnist_label_regression mnist] [--quick]

Every rival gets the same trials of its learning rate, 5 in runs of 5 epochs (MNIST: 4 in runs of 1), at 3 seeds that
are not reported; the rate falls linearly to 0. "sven" is the constructor without any option, and has no trials; "sven
tuned" is what `STUDIES` says, chosen by hand on seed 0, which is run too and not reported. The full-batch methods get
the seconds of "sven tuned" instead of epochs. `seconds_to_adam` is the time to Adam's mean final loss. An interrupted
study goes on where it was.

Needs the packages of the `rivals` extra.
"""

import argparse
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import write
from steepest.training.registry import get_optimizer
from steepest.training.tune import log_grid
from studies import short_trials, steepest

Row = dict[str, Any]
UNTOUCHED = ("lr=1.0", "rows=losses", "kappa=1.0", "solver=LeaveOneOut()", "metric=KroneckerMetric()")


@dataclass(frozen=True)
class Study:
    """One problem.

    Args:
        tuned: Options of the tuned Sven.
        tuned_schedule: Its learning rate over the run.
        seeds: Seeds that are reported.
        trials: Learning rates that every rival tries.
        trial_epochs: Epochs of a trial.
        rivals: Optimizers that run for as many epochs.
        timed: Optimizers that run for as many seconds.
    """

    tuned: tuple[str, ...]
    tuned_schedule: str = "linear"
    seeds: int = 5
    trials: int = 5
    trial_epochs: int = 5
    rivals: tuple[str, ...] = ("adam", "adamw", "sgd", "muon", "soap", "lbfgs", "half-inverse")
    timed: tuple[str, ...] = ("lbfgs-full", "levenberg-marquardt")


FEWEST = ("adam", "sgd", "muon")
FEWER = ("adam", "sgd", "muon", "soap", "half-inverse")
STUDIES = {
    "toy_1d": Study(("lr=0.215", "rows=residuals", "solver=TruncatedEigh(rtol=1e-6,exponent=0.5)")),
    "polynomial": Study((
        "lr=1.0", "rows=losses", "kappa=1.0", "solver=LeaveOneOut(smallest=0.1,largest=1e3,slack=0.0)",
        "metric=KroneckerMetric()",
    ), tuned_schedule="constant", rivals=FEWER),
    "mnist_label_regression": Study(
        ("lr=0.5", "rows=losses", "kappa=1.0", "weight_decay=1e-4", "solver=Damped(damping=0.1)"),
        seeds=3, trials=4, trial_epochs=1, rivals=FEWEST, timed=(),
    ),
    "mnist": Study(
        ("lr=1.5", "rows=losses", "kappa=2.0", "weight_decay=3e-4", "solver=Damped(damping=0.1)"),
        seeds=3, trials=4, trial_epochs=1, rivals=FEWEST, timed=(),
    ),
}  # fmt: skip


def sets(options: tuple[str, ...]) -> list[str]:
    return [word for option in options for word in ("--set", f"sven.{option}")]


def run(task: str, study: Study, folder: Path, epochs: str) -> list[Row]:
    common = ("--seeds", str(study.seeds + 1), "--tune", "0")
    by_epochs = (*common, "--epochs", epochs)
    rows = []

    def compare(name: str, optimizer: str, *arguments: str) -> None:
        steepest("compare", task, "-o", optimizer, *arguments, "--out", str(folder / name))
        rows.append(row_of(task, name, optimizer, folder / name / "records", study.trials))

    compare("sven", "sven", *by_epochs, *sets(UNTOUCHED))
    compare("sven tuned", "sven", *by_epochs, "--schedule", study.tuned_schedule, *sets(study.tuned))
    for rival in study.rivals:
        rates = short_trials((task, "-o", rival), study.trial_epochs, study.trials, folder / "trials" / rival)
        compare(rival, rival, *by_epochs, *rates)
    for rival in study.timed:
        compare(rival, rival, *common, "--budget-seconds", str(round(rows[1]["seconds"])))
    (adam,) = (row for row in rows if row["optimizer"] == "adam")
    for row in rows:
        row["seconds_to_adam"] = seconds_to(adam["val_loss"], reported(folder / row["optimizer"] / "records"))
    return rows


def reported(records: Path) -> list[Row]:
    """The runs of an arm, without the seed that options were chosen on."""
    runs = [json.loads(path.read_text()) for path in sorted(records.glob("*.jsonl"))]
    return [one for one in runs if one["seed"] > 0]


def seconds_to(goal: float, runs: list[Row]) -> float | None:
    """Mean seconds until the validation loss is at a goal, where all runs get there."""
    found = []
    for one in runs:
        there = [p["seconds"] for p in one["history"] if p["val_loss"] is not None and p["val_loss"] <= goal]
        found += there[:1]
    return statistics.fmean(found) if len(found) == len(runs) else None


def row_of(task: str, name: str, optimizer: str, records: Path, trials: int) -> Row:
    runs = reported(records)
    done = [one for one in runs if one["status"] == "finished"]
    losses = [one["final"]["val_loss"] for one in done]
    rate = runs[0]["options"].get("lr")
    grid = log_grid(*get_optimizer(optimizer).lr_range, trials)
    return {
        "task": task,
        "optimizer": name,
        "lr": rate,
        "at_edge": optimizer != "sven" and rate in {grid[0], grid[-1]},
        "val_loss": statistics.fmean(losses) if losses else None,
        "std": statistics.stdev(losses) if len(losses) > 1 else None,
        "worst": max(losses, default=None),
        "seconds": statistics.fmean(one["seconds"] for one in done) if done else None,
        "finished": f"{len(done)}/{len(runs)}",
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("studies", nargs="*", choices=[*STUDIES, []], metavar="study")
    parser.add_argument("--out", type=Path, default=Path("runs/sven_rivals"))
    parser.add_argument("--quick", action="store_true", help="one epoch; no record")
    given = parser.parse_args()
    rows: list[Row] = []
    for task in given.studies or STUDIES:
        if task.startswith("mnist") and "STEEPEST_DATA" not in os.environ:
            print(f"{task} skipped: STEEPEST_DATA is not set")
            continue
        rows += run(task, STUDIES[task], given.out / task, "1" if given.quick else "20")
    if rows and not given.quick:
        write("sven_rivals", rows)


if __name__ == "__main__":
    main()
