"""What runs leave in their folder: the report, a summary as JSON and Markdown, one plot per task."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from steepest.report.groups import group
from steepest.report.html import write_report
from steepest.report.plot import save_loss_plot
from steepest.report.summary import summarise
from steepest.report.table import markdown_table, summary_json
from steepest.training.files import write_atomically
from steepest.training.records import RunRecord

__all__ = ["write_outcome"]


def write_outcome(
    records: Sequence[RunRecord],
    folder: Path,
    *,
    subtitle: str,
    title: str | None = None,
    goals: Mapping[str, float] | None = None,
) -> dict[str, list[Path]]:
    """Write report, summary and plots.

    Args:
        records: Records of one comparison or of several.
        folder: Their folder.
        subtitle: How the runs were made, for the plots.
        title: Heading of the report; None makes one from the records.
        goals: Validation loss to reach, by task.

    Returns:
        The files, under "report", "summary" and "plots".
    """
    summaries = summarise(records, goals)
    folder.mkdir(parents=True, exist_ok=True)
    titles = [f"{summary.task} ({summary.variant})" if summary.variant else summary.task for summary in summaries]
    tables = [f"## {name}\n\n{markdown_table(summary)}\n" for name, summary in zip(titles, summaries, strict=True)]
    contents = {
        folder / "summary.json": json.dumps({"schema": 2, "tasks": summary_json(summaries)}, indent=1) + "\n",
        folder / "summary.md": "\n".join(tables),
    }
    for path, content in contents.items():
        write_atomically(path, content)
    plots = [path for cell in group(records) for path in save_loss_plot(cell, folder / "plots", subtitle=subtitle)]
    report = write_report(records, folder / "report.html", title=title, goals=goals)
    return {"report": [report], "summary": list(contents), "plots": plots}
