"""Sven without any option on many seeds: does a run diverge, and how far apart are they?

    OMP_NUM_THREADS=1 python benchmarks/sven_seeds.py [--seeds 50]

A run has diverged if its final validation loss is not finite or above ten times that of the untrained model. The
learning rate is constant. "lowest" is the median of the lowest loss that a run had after any epoch: small noisy
tables are overfitted from there on.
"""

import argparse
import statistics

from records import write
from steepest.training.execute import execute
from steepest.training.spec import RunSpec

# Task and epochs: not the whole budget, since runs diverge early if they do.
TASKS = (("toy_1d", 3), ("polynomial", 3), ("digits", 5), ("diabetes", 10), ("breast_cancer", 10))
UNTOUCHED = {"lr": 1.0, "rows": "losses"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=50)
    given = parser.parse_args()
    rows = []
    for task, epochs in TASKS:
        runs = [
            execute(RunSpec(task, "sven", UNTOUCHED, epochs=epochs, seed=seed, schedule="constant"))
            for seed in range(given.seeds)
        ]
        losses = [run.final.val_loss for run in runs if run.final is not None and run.final.val_loss is not None]
        untrained = [run.history[0].val_loss or 0.0 for run in runs]
        rows.append({
            "task": task,
            "epochs": epochs,
            "untrained": statistics.median(untrained),
            "lowest": statistics.median(min(entry.val_loss or 0.0 for entry in run.history[1:]) for run in runs),
            "median": statistics.median(losses),
            "worst": max(losses),
            "finished": f"{sum(run.status == 'finished' for run in runs)}/{len(runs)}",
        })
        print(rows[-1], flush=True)
    write("sven_seeds", rows)


if __name__ == "__main__":
    main()
