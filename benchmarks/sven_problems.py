"""Sven on the two synthetic problems of its paper (arXiv 2604.01279), 20 epochs, 5 seeds, by `steepest compare`.

    python benchmarks/sven_problems.py

`published` is the authors' validation loss where the setting is theirs.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from records import write

AS_AUTHORS = ("rows=losses", "max_norm_ratio=none")
LOSSES, RESIDUALS = ("rows=losses",), ("rows=residuals",)
TRUNCATED = "solver=TruncatedEigh(rank=32,rtol=1e-4)"
HALF = "solver=TruncatedEigh(rtol=1e-6,exponent=0.5)"
# problem, what, schedule, options, published or None
CASES = [
    ("toy_1d", "as the authors", "constant", (*AS_AUTHORS, "lr=0.01", TRUNCATED), 5.1e-7),
    ("toy_1d", "falling lr, guard", "linear", (*LOSSES, "lr=0.02", TRUNCATED), None),
    ("toy_1d", "residuals, damped", "linear", (*RESIDUALS, "lr=0.1", "solver=Damped(damping=1e-6)"), None),
    ("toy_1d", "residuals, half-inverse", "linear", (*RESIDUALS, "lr=0.215", HALF), None),
    (
        "polynomial",
        "as the authors",
        "constant",
        (*AS_AUTHORS, "lr=0.5", "solver=TruncatedEigh(rank=16,rtol=3e-2)"),
        0.139,
    ),
    ("polynomial", "residuals, damped", "linear", (*RESIDUALS, "lr=0.5", "solver=Damped(damping=0.1)"), None),
    (
        "polynomial",
        "residuals, damped half-inverse",
        "linear",
        (*RESIDUALS, "lr=0.3", "solver=Damped(damping=0.1,exponent=0.5)"),
        None,
    ),
]


def run(task: str, schedule: str, options: tuple[str, ...], out: Path) -> list[float]:
    settings = [part for option in options for part in ("--set", f"sven.{option}")]
    command = [sys.executable, "-m", "steepest.cli", "compare", task, "-o", "sven", "--seeds", "5", "--epochs", "20"]
    command += ["--schedule", schedule, "--out", str(out), "--json", *settings]
    subprocess.run(command, check=True, capture_output=True)
    records = [json.loads(path.read_text()) for path in sorted((out / "records").glob("*.jsonl"))]
    return [record["final"]["val_loss"] for record in records]


def main() -> None:
    rows = []
    for task, what, schedule, options, published in CASES:
        with tempfile.TemporaryDirectory() as folder:
            losses = run(task, schedule, options, Path(folder))
        row = {"task": task, "what": what, "mean": sum(losses) / len(losses), "worst": max(losses), "seeds": losses}
        rows.append(row | {"published": published, "schedule": schedule, "options": list(options)})
        print(task, what, " ".join(f"{loss:.2g}" for loss in losses), flush=True)
    write("sven_problems", rows)


if __name__ == "__main__":
    main()
