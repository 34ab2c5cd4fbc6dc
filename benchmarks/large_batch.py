"""KFAC and FOP against SGD, AdamW and KFAC at twice the learning rate, over batch sizes and on long tails.

    STEEPEST_DATA=... python benchmarks/large_batch.py [digits longtail fashion cifar] [--out runs/large_batch]

Every optimizer's learning rate is tuned at every batch size by 4 trials on 3 other seeds; for CIFAR-10, an epoch of
which takes a quarter of a minute on a CPU, in trials of 2 epochs. The goal is what the runs of the first optimizer all
reach. An interrupted study goes on where it was; the reports are in the folder.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import write

RIVALS = "adamw,sgd,kfac,kfac-2x,fop"


@dataclass(frozen=True)
class Study:
    """A comparison.

    Args:
        arguments: Of steepest compare.
        batches: Values of --batch-size; none for that of the task.
        epochs: Per run, and per trial of the tuning; none for those of the task.
        needs_files: Whether it reads the data folder.
    """

    arguments: tuple[str, ...]
    batches: tuple[str, ...] = ()
    epochs: tuple[int, int] | None = None
    needs_files: bool = False


STUDIES = {
    "digits": Study(("digits", "-o", RIVALS, "--seeds", "3"), ("64", "256", "all"), (20, 20)),
    "longtail": Study(("digits_lt50", "digits_lt100", "-o", f"{RIVALS},sven", "--seeds", "5")),
    "fashion": Study(
        ("fashion_mnist", "-o", RIVALS, "--seeds", "3"), ("512", "2048", "8192", "all"), (10, 10), needs_files=True
    ),
    # An eighth of the channels of a ResNet-18 and one block in each of three stages: what a CPU can do.
    "cifar": Study(
        ("cifar10_resnet", "--model", "resnet:8,16,32", "-o", RIVALS, "--seeds", "3"),
        ("512",),
        (8, 2),
        needs_files=True,
    ),
}


def steepest(*arguments: str) -> list[dict[str, Any]]:
    """Run the command and return the summaries that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "steepest.cli", *arguments, "--json"], stdout=subprocess.PIPE, check=True
    )
    tasks: list[dict[str, Any]] = json.loads(done.stdout)["tasks"]
    return tasks


def run(study: Study, folder: Path) -> list[dict[str, Any]]:
    tune, out = ("--tune", "4"), ("--out", str(folder))
    epochs, tuning_epochs = study.epochs or (None, None)
    length = ("--epochs", str(epochs)) if epochs else ()
    if epochs == tuning_epochs:
        sizes = ("--batch-sizes", ",".join(study.batches)) if study.batches else ()
        return steepest("compare", *study.arguments, *length, *sizes, *tune, *out)
    for batch in study.batches:
        size = ("--batch-size", batch)
        # The last --seeds counts: of the short runs only the rates are wanted.
        short = ("--epochs", str(tuning_epochs), "--seeds", "1", "--out", str(folder / "tuning" / batch))
        (tuned,) = steepest("compare", *study.arguments, *size, *tune, *short)
        rates = chosen(tuned)
        steepest("compare", *study.arguments, *length, *size, *rates, *out)
    return steepest("report", str(folder))


def chosen(summary: dict[str, Any]) -> Sequence[str]:
    """Arguments that set the learning rates of a summary."""
    return [word for row in summary["rows"] for word in ("--set", f"{row['optimizer']}.lr={row['options']['lr']}")]


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
    parser.add_argument("studies", nargs="*", default=list(STUDIES), choices=[*STUDIES, []], metavar="study")
    parser.add_argument("--out", type=Path, default=Path("runs/large_batch"))
    given = parser.parse_args()
    rows = []
    for name in given.studies:
        if STUDIES[name].needs_files and "STEEPEST_DATA" not in os.environ:
            print(f"{name} skipped: STEEPEST_DATA is not set")
            continue
        for summary in run(STUDIES[name], given.out / name):
            rows += rows_of(summary, given.out / name)
    write("large_batch", rows)


if __name__ == "__main__":
    main()
