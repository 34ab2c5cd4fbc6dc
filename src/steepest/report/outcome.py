"""What a finished comparison leaves in its folder: summary as JSON and Markdown, one plot per task."""

import json
from collections.abc import Sequence
from pathlib import Path

from steepest.report.plot import save_loss_plot
from steepest.report.summary import summarise
from steepest.report.table import markdown_table, summary_json
from steepest.training.records import RunRecord, write_atomically

__all__ = ["write_outcome"]


def write_outcome(records: Sequence[RunRecord], folder: Path, *, subtitle: str) -> dict[str, list[Path]]:
    """Write summary and plots.

    Args:
        records: Records of one comparison.
        folder: The comparison's folder.
        subtitle: How the comparison was made, for the plots.

    Returns:
        The files, under "summary" and "plots".
    """
    summaries = summarise(records)
    folder.mkdir(parents=True, exist_ok=True)
    tables = [f"## {summary.task}\n\n{markdown_table(summary)}\n" for summary in summaries]
    files = {
        folder / "summary.json": json.dumps({"schema": 1, "tasks": summary_json(summaries)}, indent=1) + "\n",
        folder / "summary.md": "\n".join(tables),
    }
    for path, content in files.items():
        write_atomically(path, content)
    plots = [
        path
        for summary in summaries
        for path in save_loss_plot(
            [record for record in records if record.task == summary.task], folder / "plots", subtitle=subtitle
        )
    ]
    return {"summary": list(files), "plots": plots}
