"""The report: one HTML file that needs nothing but itself."""

import re
from collections.abc import Sequence
from pathlib import Path

from steepest._versions import package_version
from steepest.report.charts import Charts
from steepest.report.grids import environment_grid, overview_grid
from steepest.report.groups import Cell, group, studies
from steepest.report.measure import Goals
from steepest.report.sheet import page_sheet, page_template
from steepest.report.summary import summarise_cell
from steepest.report.sweep import sweep_of
from steepest.report.sweep_view import SweepSection, sweep_section
from steepest.report.view import section
from steepest.report.words import count, listing
from steepest.training.files import write_atomically
from steepest.training.records import RunRecord

__all__ = ["render_report", "write_report"]


def render_report(records: Sequence[RunRecord], *, title: str | None = None, goals: Goals | None = None) -> str:
    """Make the page.

    Args:
        records: Runs of one comparison, of several, or a single one.
        title: Heading of the page; None makes one from the records.
        goals: What is timed; None for the default goals.

    Returns:
        HTML; the same records give the same text.
    """
    cells = group(records)
    summaries = [summarise_cell(cell, goals) for cell in cells]
    charts = Charts()
    sections = [
        section(cell, summary, place, charts)
        for place, (cell, summary) in enumerate(zip(cells, summaries, strict=True), start=1)
    ]
    environments = [record.environment for record in records]
    page = page_template("template.html.j2").render(
        title=title or _title(cells),
        lead=_lead(records, cells),
        overview=overview_grid(summaries, [cell.title for cell in cells]) if len(cells) > 1 else None,
        sections=sections,
        sweeps=_sweeps(cells, goals, charts),
        environment=environment_grid(environments),
        environments_differ=any(environment != environments[0] for environment in environments),
        memory_kinds=list(dict.fromkeys(record.memory_kind for record in records)),
        version=package_version("steepest"),
        css=page_sheet(charts.paint),
    )
    return page + "\n"


def write_report(
    records: Sequence[RunRecord],
    path: Path,
    *,
    title: str | None = None,
    goals: Goals | None = None,
) -> Path:
    """Write the page, so that the file is either complete or as it was.

    Args:
        records: Runs of one comparison, of several, or a single one.
        path: Where to; its folder is made when missing.
        title: Heading of the page; None makes one from the records.
        goals: What is timed; None for the default goals.

    Returns:
        The path.
    """
    page = render_report(records, title=title, goals=goals)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def _sweeps(cells: Sequence[Cell], goals: Goals | None, charts: Charts) -> dict[str, SweepSection]:
    """Sections about batch sizes, by the section that each stands before: the first of its own."""
    found = {}
    for place, study in enumerate(studies(cells), start=1):
        first = 1 + min(cells.index(cell) for cell in study.cells)
        found[f"section-{first}"] = sweep_section(sweep_of(study, goals or Goals()), place, charts)
    return found


def _title(cells: Sequence[Cell]) -> str:
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    where = listing(tasks) if 0 < len(tasks) < 4 else count(len(tasks), "problem")
    labels = list(dict.fromkeys(row.label for cell in cells for row in cell.rows))
    if not labels:
        return "No runs"
    return f"{labels[0]} on {where}" if len(labels) == 1 else f"Optimizers on {where}"


def _lead(records: Sequence[RunRecord], cells: Sequence[Cell]) -> str:
    if not records:
        return "There are no records to report."
    finished = sum(record.status == "finished" for record in records)
    names = {row.optimizer for cell in cells for row in cell.rows}
    rows = {row.label for cell in cells for row in cell.rows}
    settings = f" in {len(rows)} settings" if len(rows) > len(names) else ""
    seeds = {record.seed for record in records}
    parts = [count(len(names), "optimizer") + settings, count(len(seeds), "seed"), count(len(records), "run")]
    ended = "all finished" if finished == len(records) else f"{finished:,} finished"
    newest = max(record.started for record in records)
    when = re.sub(r"\.\d+", "", newest).replace("T", " ").replace("+00:00", " UTC")
    if len(records) == 1:
        return f"1 run, {records[0].status.replace('_', ' ')}. It was started on {when}."
    return f"{', '.join(parts)}, {ended}. The newest run was started on {when}."
