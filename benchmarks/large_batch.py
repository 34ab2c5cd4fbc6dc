"""KFAC and FOP against SGD, AdamW and KFAC at twice the learning rate, over batch sizes and on long tails.

    STEEPEST_DATA=... python benchmarks/large_batch.py [--out runs/large_batch]

Every optimizer's learning rate is tuned at every batch size by 4 trials on 3 other seeds. The goal is what the runs of
the first optimizer all reach, or `--goal`. An interrupted study goes on where it was; the reports are in the folder.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from records import write

RIVALS = "adamw,sgd,kfac,kfac-2x,fop"
# folder, needs files, arguments of steepest compare
STUDIES = [
    ("digits", False, ["digits", "--batch-sizes", "64,256,all", "-o", RIVALS, "--seeds", "3", "--epochs", "20"]),
    ("longtail", False, ["digits_lt50", "digits_lt100", "-o", f"{RIVALS},sven", "--seeds", "5"]),
    (
        "fashion",
        True,
        ["fashion_mnist", "--batch-sizes", "512,2048,8192,all", "-o", RIVALS, "--seeds", "3", "--epochs", "10"],
    ),
]


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
    parser.add_argument("--out", type=Path, default=Path("runs/large_batch"))
    out = parser.parse_args().out
    rows = []
    for name, needs_files, arguments in STUDIES:
        if needs_files and "STEEPEST_DATA" not in os.environ:
            print(f"{name} skipped: STEEPEST_DATA is not set")
            continue
        command = [sys.executable, "-m", "steepest.cli", "compare", *arguments, "--tune", "4", "--out", str(out / name)]
        done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, check=True)
        for summary in json.loads(done.stdout)["tasks"]:
            rows += rows_of(summary, out / name)
    write("large_batch", rows)


if __name__ == "__main__":
    main()
