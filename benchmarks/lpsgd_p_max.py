"""LPSGDM at p_max from 2 to 10 against SGD, AdamW, signSGD, Signum and Lion: the learning rate is tuned for each.

    STEEPEST_DATA=... python benchmarks/lpsgd_p_max.py [digits fashion cifar] [--out runs/lpsgd_p_max] [--quick]

p falls from p_max to 2 along a cosine over the steps of a run. Every optimizer, and LPSGDM at every p_max, gets the
same number of trials of its learning rate on 3 seeds that are not reported, each over its own range; for CIFAR-10, an
epoch of which takes ten seconds on a CPU, in trials of one epoch. `at_edge` says that the best rate was the
first or last of its range. An interrupted study goes on where it was. The folder has a report for every problem and a
plot of the final validation loss against p_max, the others as lines across.
"""

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from records import write
from steepest.training.registry import get_optimizer
from steepest.training.tune import log_grid
from studies import short_trials, steepest

P_MAX = ("2", "2.5", "3", "4", "6", "10")
RIVALS = ("sgd", "sgd-plain", "adamw", "signsgd", "signum", "lion", "lpsgd")
Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Comparisons on one problem.

    Args:
        arguments: Of steepest compare.
        trials: Learning rates that are tried.
        trial_epochs: Per trial of the tuning; none for as many as in a run.
        seeds: Seeds that are reported.
        needs_files: Whether it reads the data folder.
    """

    arguments: tuple[str, ...]
    trials: int = 9
    trial_epochs: int | None = None
    seeds: int = 5
    needs_files: bool = False


STUDIES = {
    "digits": Study(("digits",)),
    "fashion": Study(("fashion_mnist",), seeds=3, needs_files=True),
    # An eighth of the channels of a ResNet-18 and one block in each of three stages: what a CPU can do.
    "cifar": Study(
        ("cifar10_resnet", "--model", "resnet:8,16,32", "--batch-size", "128", "--epochs", "5"),
        trials=5,
        trial_epochs=1,
        seeds=3,
        needs_files=True,
    ),
}


def compare(study: Study, optimizer: str, options: Sequence[str], folder: Path) -> None:
    """Tune one optimizer and run it; all arms of a study have one folder, whose records have their options."""
    arm = (*study.arguments, "-o", optimizer, *(word for option in options for word in ("--set", option)))
    tune, out = ("--tune", str(study.trials)), ("--out", str(folder))
    seeds = ("--seeds", str(study.seeds))
    if study.trial_epochs is None:
        steepest("compare", *arm, *seeds, *tune, *out)
        return
    # A folder for each arm, so that there is one row in it.
    name = "-".join([optimizer, *options]).replace("=", "-")
    budget = ("--epochs", str(study.trial_epochs))
    rates = short_trials(arm, budget, study.trials, folder / "tuning" / name)
    steepest("compare", *arm, *seeds, *rates, *out)


def run(study: Study, folder: Path) -> list[Row]:
    for optimizer in RIVALS:
        compare(study, optimizer, (), folder)
    for p_max in P_MAX:
        compare(study, "lpsgdm", (f"lpsgdm.p={p_max}",), folder)
    (summary,) = steepest("report", str(folder), "--out", str(folder / "report.html"))
    return [row_of(summary["task"], row, study.trials) for row in summary["rows"]]


def row_of(task: str, row: dict[str, Any], trials: int) -> Row:
    numbers, options = row["numbers"], row["options"]
    grid = log_grid(*get_optimizer(row["optimizer"]).lr_range, trials)
    return {
        "task": task,
        "optimizer": row["optimizer"],
        "p_max": options["p"] if row["optimizer"] == "lpsgdm" else None,
        "lr": options["lr"],
        "at_edge": options["lr"] in {grid[0], grid[-1]},
        "val_loss": numbers.get("val_loss", {}).get("mean"),
        "std": numbers.get("val_loss", {}).get("std"),
        "metric": numbers.get("metric", {}).get("mean"),
        "metric_std": numbers.get("metric", {}).get("std"),
        "seconds": numbers.get("seconds", {}).get("mean"),
        "finished": f"{row['finished']}/{row['attempted']}",
    }


def draw(rows: Iterable[Row], path: Path) -> None:
    """Final validation loss against p_max; a panel for each problem."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    tasks: dict[str, list[Row]] = {}
    for row in rows:
        if row["val_loss"] is not None:
            tasks.setdefault(row["task"], []).append(row)
    figure, panels = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 3.8), layout="constrained", squeeze=False)
    for axes, (task, mine) in zip(panels[0], tasks.items(), strict=True):
        arms = sorted((row for row in mine if row["p_max"] is not None), key=lambda row: row["p_max"])
        axes.errorbar(
            [row["p_max"] for row in arms],
            [row["val_loss"] for row in arms],
            [row["std"] or 0.0 for row in arms],
            color="#882255",
            marker="o",
            capsize=3,
            label="LPSGDM",
        )
        for row in mine:
            if row["p_max"] is None:
                entry = get_optimizer(row["optimizer"])
                axes.axhline(row["val_loss"], color=entry.colour, linewidth=1, linestyle="--", label=entry.label)
        axes.set(title=task, xlabel="p_max", ylabel="final validation loss", xscale="log")
        axes.set_xticks([float(p) for p in P_MAX], P_MAX)
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    print(f"plot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("studies", nargs="*", choices=[*STUDIES, []], metavar="study")
    parser.add_argument("--out", type=Path, default=Path("runs/lpsgd_p_max"))
    parser.add_argument("--quick", action="store_true", help="one epoch, two trials, two seeds; no record")
    given = parser.parse_args()
    rows: list[Row] = []
    for name in given.studies or STUDIES:
        study = STUDIES[name]
        if study.needs_files and "STEEPEST_DATA" not in os.environ:
            print(f"{name} skipped: STEEPEST_DATA is not set")
            continue
        if given.quick:
            short = 1 if study.trial_epochs else None
            study = replace(study, arguments=(*study.arguments, "--epochs", "1"), trials=2, seeds=2, trial_epochs=short)
        rows += run(study, given.out / name)
    if rows:
        draw(rows, given.out / "p_max.svg")
    if given.quick:
        for row in rows:
            print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    elif rows:
        write("lpsgd_p_max", rows)


if __name__ == "__main__":
    main()
