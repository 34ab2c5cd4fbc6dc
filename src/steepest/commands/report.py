"""`steepest report`: records of any number of folders to one HTML file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import typer
from rich.console import Console

from steepest.commands.output import goals_for, print_files, print_tables, result_json
from steepest.report.html import write_report
from steepest.report.words import count
from steepest.training.errors import RecordError
from steepest.training.records import RecordStore, RunRecord

__all__ = ["report"]


def report(
    folders: Sequence[Path],
    out: Path | None,
    *,
    title: str | None,
    goal: float | Mapping[str, float] | None,
    goal_metric: str | None,
    json: bool,
) -> int:
    """Write the report.

    Args:
        folders: Folders of runs.
        out: The file; `report.html` in the first folder by default.
        title: Title of the report.
        goal: Value that is timed, one for all tasks or one for each.
        goal_metric: Metric that it is a value of; None for the validation loss.
        json: Print JSON instead of tables.

    Returns:
        The exit code.
    """
    # The order of a comparison, so that its own report and this one list its optimizers alike.
    found = sorted((record for folder in folders for record in _read(folder)), key=lambda record: record.started)
    records = _once(found)
    if len(records) < len(found):
        told = f"{count(len(found) - len(records), 'record')} of runs that are there more than once left out: "
        Console(stderr=True, markup=False, highlight=False).print(f"{told}each counts once", soft_wrap=True)
    metrics = {record.task: [metric.name for metric in record.problem.metrics] for record in records}
    goals = goals_for(goal, goal_metric, metrics)
    path = out or folders[0] / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(records, path, title=title, goals=goals)
    if json:
        typer.echo(result_json(records, goals, {"report": path}))
    else:
        console = Console(markup=False, highlight=False)
        print_tables(console, records, goals)
        print_files(console, {"report": path})
    return 0


def _once(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Each run once: copies would pass for other seeds. The newest that finished stays, or else the newest."""
    best: dict[str, RunRecord] = {}
    for record in records:
        known = best.get(record.key)
        if known is None or record.status == "finished" or known.status != "finished":
            best[record.key] = record
    return list(best.values())


def _read(folder: Path) -> list[RunRecord]:
    """Records of a comparison's folder, or of a folder that holds the records themselves."""
    if not folder.is_dir():
        raise RecordError(
            f"{folder} {'is no folder' if folder.exists() else 'does not exist'}: name the --out of a run"
        )
    place = folder / "records" if (folder / "records").is_dir() else folder
    records = RecordStore(place).read_all()
    if not records:
        raise RecordError(f"there are no run records in {place}: name the --out folder of a train or a compare")
    return records
