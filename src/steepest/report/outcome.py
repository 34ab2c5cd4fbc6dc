"""What runs leave in their folder: the report, a summary as JSON and Markdown, plots of every task."""

import json
from collections.abc import Sequence
from pathlib import Path

from steepest.report.groups import group
from steepest.report.html import write_report
from steepest.report.measure import Goals
from steepest.report.plot import save_plots
from steepest.report.summary import summarise_cell
from steepest.report.sweep import sweeps_of
from steepest.report.sweep_charts import save_sweep_plots
from steepest.report.sweep_table import sweep_json, sweep_markdown
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
    goals: Goals | None = None,
) -> dict[str, list[Path]]:
    """Write report, summary and plots.

    Args:
        records: Records of one comparison or of several.
        folder: Their folder.
        subtitle: How the runs were made, for the plots.
        title: Heading of the report; None makes one from the records.
        goals: What is timed; None for the default goals.

    Returns:
        The files, under "report", "summary" and "plots".
    """
    cells = group(records)
    summaries, sweeps = [summarise_cell(cell, goals) for cell in cells], sweeps_of(cells, goals)
    folder.mkdir(parents=True, exist_ok=True)
    titles = [f"{summary.task} ({summary.variant})" if summary.variant else summary.task for summary in summaries]
    tables = [f"## {name}\n\n{markdown_table(summary)}\n" for name, summary in zip(titles, summaries, strict=True)]
    tables += [sweep_markdown(sweep) for sweep in sweeps]
    contents = {
        folder / "summary.json": json.dumps(
            {"schema": 2, "tasks": summary_json(summaries), "sweeps": sweep_json(sweeps)}, indent=1
        )
        + "\n",
        folder / "summary.md": "\n".join(tables),
    }
    for path, content in contents.items():
        write_atomically(path, content)
    plots = [
        path
        for cell, summary in zip(cells, summaries, strict=True)
        for path in save_plots(cell, folder / "plots", goal=summary.goal, subtitle=subtitle)
    ]
    plots += [path for sweep in sweeps for path in save_sweep_plots(sweep, folder / "plots", subtitle=subtitle)]
    report = write_report(records, folder / "report.html", title=title, goals=goals)
    return {"report": [report], "summary": list(contents), "plots": plots}
