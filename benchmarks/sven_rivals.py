"""Sven and its rivals on the four problems of its paper (arXiv 2604.01279), by `steepest compare`.

    STEEPEST_DATA=... python benchmarks/sven_rivals.py [toy_1d polynomial mnist_label_regression mnist] [--quick]

Every rival gets the same trials of its learning rate, 5 in runs of 5 epochs (MNIST: 4 in runs of 1), at 3 seeds that
are not reported; the rate falls to 0, linearly or (MNIST) from three fifths of the run on. "sven" is the constructor
without any option, and has no trials; "sven tuned" is what `STUDIES` says, chosen by hand on seed 0
(run too, and not reported) and seeds from 10 on, in more trials than the rivals have.

All run for 20 epochs; rivals that need more seconds for that than the study's clock run for its seconds instead, and
those that need fewer for its seconds too ("equal seconds"), as has Sven where it needs more. All have a second run of 4
epochs ("4 epochs"), as have the tuned options of Sven: how soon a loss is reached depends on how fast the rate falls,
and some overfit later. Where the full-batch rivals run, Sven takes all samples at a time too, without options and by
Levenberg-Marquardt ("all samples"), and 256 of them without options ("batches of 256").
`seconds_to_adam` is the mean time to the lowest loss that any of Adam's runs ends with. An interrupted study goes on
where it was; `--table` prints the record as the table of the README. With `--again "sven" "sven tuned"` the runs of
these alone are made again, and those that the record has of the others are taken from there.

Needs the packages of the `rivals` extra.
"""

import argparse
import json
import os
import statistics
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from records import FOLDER, write
from steepest.training.registry import get_optimizer
from steepest.training.tune import log_grid
from studies import short_trials, steepest

Row = dict[str, Any]
ON_ALL = ("lr=1.0", "rows=residuals", "solver=LevenbergMarquardt()")
UNTOUCHED = ("lr=1.0", "rows=losses", "solver=none")


@dataclass(frozen=True)
class Study:
    """One problem.

    Args:
        tuned: Options of the tuned Sven.
        seconds: The clock.
        tuned_schedule: Its learning rate over the run, where not that of the rivals.
        untouched_schedule: That of the Sven without options.
        schedule: Of the rivals.
        trials: Learning rates that every rival tries.
        trial_epochs: Epochs of a trial.
        rivals: Optimizers that run for as many epochs.
        slow: Optimizers that run for as many seconds, and have their trials in seconds.
        timed: Full-batch optimizers without a rate, which run for as many seconds, beside Sven on all samples.
    """

    tuned: tuple[str, ...]
    seconds: int
    tuned_schedule: str | None = None
    untouched_schedule: str | None = None
    schedule: str = "linear"
    trials: int = 5
    trial_epochs: int = 5
    rivals: tuple[str, ...] = ("adam", "adamw", "sgd", "muon", "soap", "half-inverse")
    slow: tuple[str, ...] = ("lbfgs",)
    timed: tuple[str, ...] = ("lbfgs-full", "levenberg-marquardt")


FILTER = ("lr=1.0", "rows=losses", "kappa=1.0", "solver=KalmanFilter()")
SEEDS = 5
SHORT = 4  # epochs
TRIAL_SECONDS = 3
MNIST: dict[str, Any] = {
    "trials": 4, "trial_epochs": 1, "timed": (), "schedule": "trapezoidal",
    "rivals": ("adam", "adamw", "sgd", "muon"), "slow": ("soap", "lbfgs", "half-inverse"),
}  # fmt: skip
STUDIES = {
    "toy_1d": Study(FILTER, 12, untouched_schedule="constant"),
    "polynomial": Study(FILTER, 18, tuned_schedule="constant", untouched_schedule="constant"),
    "mnist_label_regression": Study(
        (
            "lr=0.5", "rows=losses", "kappa=1.0", "weight_decay=2e-4", "solver=Damped(damping=0.1)",
            "metric=BalancedMetric()",
        ),
        43,
        **MNIST,
    ),
    "mnist": Study(
        ("lr=1.5", "rows=losses", "kappa=2.0", "weight_decay=3e-4", "solver=Damped(damping=0.1)"), 33, **MNIST
    ),
}  # fmt: skip


def sets(options: tuple[str, ...]) -> list[str]:
    return [word for option in options for word in ("--set", f"sven.{option}")]


def run(task: str, study: Study, folder: Path, epochs: str, known: dict[str, Row]) -> list[Row]:
    """The rows of one problem; what is known of them already is not measured."""
    common = ("--seeds", str(SEEDS + 1), "--tune", "0", "--schedule", study.schedule)
    own = ("--schedule", study.tuned_schedule or study.schedule)
    by_epochs, short = (*common, "--epochs", epochs), (*common, "--epochs", str(min(SHORT, int(epochs))))
    rows: list[Row] = []

    def compare(name: str, optimizer: str, *arguments: str) -> Row:
        if name not in known:
            steepest("compare", task, "-o", optimizer, *arguments, "--out", str(folder / name))
        rows.append(known.get(name) or row_of(task, name, optimizer, folder / name / "records", study.trials))
        return rows[-1]

    def tried(rival: str, *budget: str) -> list[str]:
        return short_trials(
            (task, "-o", rival, "--schedule", study.schedule), budget, study.trials, folder / "trials" / rival
        )

    by_seconds = (*common, "--budget-seconds", str(study.seconds))
    untouched = ("--schedule", study.untouched_schedule or study.schedule)
    for name, schedule, options in (("sven", untouched, UNTOUCHED), ("sven tuned", own, study.tuned)):
        row = compare(name, "sven", *by_epochs, *schedule, *sets(options))
        if row["seconds"] is not None and row["seconds"] > 1.1 * study.seconds:
            compare(f"{name}, equal seconds", "sven", *by_seconds, *schedule, *sets(options))
    compare("sven tuned, 4 epochs", "sven", *short, *own, *sets(study.tuned))
    if study.timed:
        larger = (*by_epochs, *untouched, "--batch-size", "256")
        compare("sven, batches of 256", "sven", *larger, *sets(UNTOUCHED))
        steady = (*by_seconds, "--schedule", "constant", "--batch-size", "all")
        compare("sven, all samples", "sven", *steady, *sets(UNTOUCHED))
        compare("sven tuned, all samples", "sven", *steady, *sets(ON_ALL))
    quick: list[tuple[str, list[str]]] = []
    for rival in [name for name in study.rivals if name not in known]:
        rates = tried(rival, "--epochs", str(study.trial_epochs))
        row = compare(rival, rival, *by_epochs, *rates)
        compare(f"{rival}, 4 epochs", rival, *short, *rates)
        if row["seconds"] is not None and row["seconds"] < 0.9 * study.seconds:
            quick.append((rival, rates))
    for rival in [name for name in study.slow if name not in known]:
        compare(rival, rival, *by_seconds, *tried(rival, "--budget-seconds", str(TRIAL_SECONDS)))
    for rival in study.timed:
        compare(rival, rival, *by_seconds)
    for rival, rates in quick:
        compare(f"{rival}, equal seconds", rival, *by_seconds, *rates)
    rows += [row for row in known.values() if row not in rows]
    compare_with_adam(rows, folder, known)
    return rows


def compare_with_adam(rows: list[Row], folder: Path, known: dict[str, Row]) -> None:
    """Say of every row that is new how soon it was where Adam ended."""
    best = min(row["val_loss"] for row in rows if row["optimizer"].split(",")[0] == "adam")
    for row in rows:
        if row["optimizer"] not in known:
            row["seconds_to_adam"] = seconds_to(best, reported(folder / row["optimizer"] / "records"))


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


def table(rows: list[Row]) -> str:
    """The record as the README's table: final losses, and the soonest time to Adam's over all runs of an optimizer."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = ["| | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for name in dict.fromkeys(row["optimizer"].split(",")[0] for row in rows):
        label = {"sven": "`st.Sven(model)`", "sven tuned": "Sven, tuned"}.get(name) or get_optimizer(name).label
        lines.append(f"| {label} | " + " | ".join(_cell(rows, task, name) for task in tasks) + " |")
    return "\n".join(lines)


def _cell(rows: list[Row], task: str, name: str) -> str:
    here = [row for row in rows if row["task"] == task]
    arms = [row for row in here if row["optimizer"].split(",")[0] == name]
    if not arms:
        return ""
    best = min(row["val_loss"] for row in here if row["val_loss"] is not None)
    main, *others = arms
    words = [_loss(main, best)]
    better = min((row for row in others if row["val_loss"] is not None), key=lambda row: row["val_loss"], default=None)
    if better is not None and (main["val_loss"] is None or better["val_loss"] < main["val_loss"]):
        words.append(f"{better['optimizer'].split(', ')[1]} {_loss(better, best)}")
    times = [row["seconds_to_adam"] for row in arms if row["seconds_to_adam"] is not None]
    if times:
        words.append(f"{min(times):.1f} s" if min(times) < 10 else f"{min(times):.0f} s")
    return "; ".join(words)


def _loss(row: Row, best: float) -> str:
    if row["val_loss"] is None:
        return f"{row['finished']} finished"
    spread = "" if row["std"] is None else f" ± {row['std']:.2g}"
    some = "" if row["finished"] == f"{SEEDS}/{SEEDS}" else f", {row['finished']} finished"
    text = f"{row['val_loss']:.3g}{spread}".replace("e-0", "e-") + some
    return f"**{text}**" if row["val_loss"] == best else text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("studies", nargs="*", choices=[*STUDIES, []], metavar="study")
    parser.add_argument("--out", type=Path, default=Path("runs/sven_rivals"))
    parser.add_argument("--quick", action="store_true", help="one epoch; no record")
    parser.add_argument("--again", nargs="+", default=[], help="only these; the others are those of the record")
    parser.add_argument("--table", action="store_true", help="print the record as Markdown, run nothing")
    given = parser.parse_args()
    record: list[Row] = []
    if given.again or given.table:
        record = json.loads((FOLDER / "sven_rivals.json").read_text())["rows"]
    if given.table:
        print(table(record))
        return
    rows = {task: [row for row in record if row["task"] == task] for task in STUDIES}
    for task in given.studies or STUDIES:
        if task.startswith("mnist") and "STEEPEST_DATA" not in os.environ:
            print(f"{task} skipped: STEEPEST_DATA is not set")
            continue
        known = {row["optimizer"]: row for row in rows[task] if row["optimizer"].split(",")[0] not in given.again}
        rows[task] = run(task, STUDIES[task], given.out / task, "1" if given.quick else "20", known)
    if any(rows.values()) and not given.quick:
        write("sven_rivals", list(chain.from_iterable(rows.values())))


if __name__ == "__main__":
    main()
