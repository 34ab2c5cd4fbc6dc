"""Benchmark records: one JSON file per benchmark with the environment, and the table that is printed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steepest.training.environment import environment_row

FOLDER = Path(__file__).parent / "records"


def write(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``records/name.json`` and print the rows as a table."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps({"environment": environment_row("cpu"), "rows": rows}, indent=1) + "\n")
    columns = list(rows[0])
    cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in (row[c] for c in columns)] for row in rows]
    widths = [max(len(c), *(len(row[i]) for row in cells)) for i, c in enumerate(columns)]
    for line in [columns, ["-" * w for w in widths], *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"\nrecord: {path}")
