"""KFAC and FOP against SGD, AdamW and KFAC at twice the learning rate, over batch sizes and on long tails.

    STEEPEST_DATA=... python benchmarks/large_batch.py [digits longtail ...] [--out FOLDER]

Every optimizer's learning rate is tuned at every batch size by 4 trials on 3 other seeds; for CIFAR-10, an epoch of
which takes a quarter of a minute on a CPU, in trials of 2 epochs. The goal is a validation accuracy. An
interrupted study goes on where it was; the reports are in the folder.
"""

import argparse
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import write
from studies import short_trials, steepest

RIVALS = "adamw,sgd,kfac,kfac-2x,fop"


@dataclass(frozen=True)
class Study:
    """A comparison.

    Args:
        arguments: Of steepest compare.
        goal: Validation accuracy that is timed.
        batches: Values of --batch-size; none for that of the task.
        trial_epochs: Per trial of the tuning; none for as many as in a run.
        needs_files: Whether it reads the data folder.
    """

    arguments: tuple[str, ...]
    goal: str
    batches: tuple[str, ...] = ()
    trial_epochs: int | None = None
    needs_files: bool = False


STUDIES = {
    "digits": Study(("digits", "-o", RIVALS, "--seeds", "3", "--epochs", "20"), "0.93", ("64", "256", "all")),
    "longtail": Study(("digits_lt50", "digits_lt100", "-o", f"{RIVALS},sven", "--seeds", "5"), "0.7"),
    "fashion": Study(
        ("fashion_mnist", "-o", RIVALS, "--seeds", "3", "--epochs", "10"),
        "0.84",
        ("512", "2048", "8192", "all"),
        needs_files=True,
    ),
    # Where an epoch is six steps, or one, ten epochs are no training.
    "fashion_long": Study(
        ("fashion_mnist", "-o", RIVALS, "--seeds", "3", "--epochs", "40"), "0.84", ("8192", "all"), needs_files=True
    ),
    "fashion_longtail": Study(
        (
            *("fashion_mnist_cnn_lt50", "fashion_mnist_cnn_lt100", "--model", "mlp:32,32,32", "--batch-size", "512"),
            *("-o", RIVALS, "--seeds", "3", "--epochs", "10"),
        ),
        "0.7",
        needs_files=True,
    ),
    # An eighth of the channels of a ResNet-18 and one block in each of three stages: what a CPU can do.
    "cifar": Study(
        ("cifar10_resnet", "--model", "resnet:8,16,32", "-o", RIVALS, "--seeds", "3", "--epochs", "8"),
        "0.4",
        ("512",),
        trial_epochs=2,
        needs_files=True,
    ),
}


def run(study: Study, folder: Path) -> list[dict[str, Any]]:
    tune, out = ("--tune", "4"), ("--out", str(folder))
    goal = ("--goal-metric", "accuracy", "--goal", study.goal)
    if study.trial_epochs is None:
        sizes = ("--batch-sizes", ",".join(study.batches)) if study.batches else ()
        return steepest("compare", *study.arguments, *sizes, *goal, *tune, *out)
    for batch in study.batches:
        arguments = (*study.arguments, "--batch-size", batch)
        rates = short_trials(arguments, ("--epochs", str(study.trial_epochs)), 4, folder / "tuning" / batch)
        steepest("compare", *arguments, *rates, *out)
    return steepest("report", str(folder), *goal)


def measured_r(folder: Path, task: str, batch: int) -> float | None:
    """Median over FOP's runs and epochs of the mean r of the layers."""
    found = []
    for path in folder.glob(f"records/{task}.fop.*.jsonl"):
        record = json.loads(path.read_text())
        if record["batch_size"] == batch:
            found += [point["diagnostics"]["r"] for point in record["history"] if "r" in point["diagnostics"]]
    return statistics.median(found) if found else None


def rows_of(summary: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    batch = int(summary["variant"].removeprefix("batch ")) if summary["variant"] else None
    if batch is None:
        first = next(folder.glob(f"records/{summary['task']}.*.jsonl"))
        batch = json.loads(first.read_text())["batch_size"]
    goal = {reach["label"]: reach for reach in (summary["goal"] or {"rows": []})["rows"]}
    rows = []
    for row in summary["rows"]:
        numbers, reach = row["numbers"], goal.get(row["label"], {})
        rows.append({
            "study": folder.name,
            "task": summary["task"],
            "batch": batch,
            "optimizer": row["optimizer"],
            "lr": row["options"]["lr"],
            "val_loss": numbers.get("val_loss", {}).get("mean"),
            "std": numbers.get("val_loss", {}).get("std"),
            "metric": numbers.get("metric", {}).get("mean"),
            "seconds": numbers.get("seconds", {}).get("mean"),
            "finished": f"{row['finished']}/{row['attempted']}",
            "reached": f"{reach.get('reached', 0)}/{reach.get('attempted', 0)}",
            "goal_epochs": reach.get("epochs"),
            "goal_seconds": reach.get("seconds"),
            "r": measured_r(folder, summary["task"], batch) if row["optimizer"] == "fop" else None,
        })
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("studies", nargs="*", choices=[*STUDIES, []], metavar="study")
    parser.add_argument("--out", type=Path, default=Path("runs/large_batch"))
    given = parser.parse_args()
    rows = []
    for name in given.studies or STUDIES:
        if STUDIES[name].needs_files and "STEEPEST_DATA" not in os.environ:
            print(f"{name} skipped: STEEPEST_DATA is not set")
            continue
        for summary in run(STUDIES[name], given.out / name):
            rows += rows_of(summary, given.out / name)
    write("large_batch", rows)


if __name__ == "__main__":
    main()
