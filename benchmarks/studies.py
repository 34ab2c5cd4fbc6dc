"""Studies made of runs of the command: what the scripts that make them have in common."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def steepest(*arguments: str) -> list[dict[str, Any]]:
    """Run the command and return the summaries that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "steepest.cli", *arguments, "--json"], stdout=subprocess.PIPE, check=True
    )
    tasks: list[dict[str, Any]] = json.loads(done.stdout)["tasks"]
    return tasks


def short_trials(arguments: Sequence[str], budget: Sequence[str], trials: int, folder: Path) -> list[str]:
    """Tune in runs shorter than those that are reported.

    Args:
        arguments: Of steepest compare, for one task and one batch size.
        budget: Of one trial, as a flag and its value.
        trials: Learning rates per optimizer.
        folder: Where the trials' records are kept.

    Returns:
        Arguments that set the learning rates that were best.
    """
    # The last of two equal flags counts: of the short runs only the rates are wanted.
    short = (*budget, "--seeds", "1", "--tune", str(trials), "--out", str(folder))
    (summary,) = steepest("compare", *arguments, *short)
    return [word for row in summary["rows"] for word in ("--set", f"{row['optimizer']}.lr={row['options']['lr']}")]
