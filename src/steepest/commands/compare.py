"""`steepest compare`: several optimizers with one budget, tuned by equal trials."""

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from steepest.commands.output import goals_for, print_files, print_tables, result_json
from steepest.distributed import Ranks
from steepest.errors import InvalidOptionError
from steepest.report.live import listener_for
from steepest.report.measure import Goals
from steepest.report.outcome import write_outcome
from steepest.report.words import listing
from steepest.training.compare import Execute, plan_runs, run_all
from steepest.training.execute import execute
from steepest.training.isolate import execute_isolated
from steepest.training.processes import alone_first, check_shares, process_group
from steepest.training.records import RecordStore, RunRecord
from steepest.training.settings import CompareSettings
from steepest.training.source import resolve
from steepest.training.spec import RunSpec
from steepest.training.tune import Choice, apply_choices, choose, tuning_runs

__all__ = ["compare"]

_FOLDER = "runs/compare"
# Learning rates that are tried for every optimizer on a task that has no stored ones.
_DEFAULT_TRIALS = 5


def compare(settings: CompareSettings, *, fresh: bool, json: bool) -> int:
    """Carry out a comparison and show who won.

    Args:
        settings: What to compare.
        fresh: Repeat runs that are recorded already.
        json: Print JSON instead of tables.

    Returns:
        The exit code: 1 if a run failed.

    Raises:
        KeyboardInterrupt: If it was interrupted; finished runs are recorded.
    """
    request = settings.request()
    specs = plan_runs(request)
    goals = goals_for(settings.goal, settings.goal_metric, _metrics(settings, specs))
    trials = _trials(settings, specs)
    out = Path(settings.out or _FOLDER)
    store, tuning = RecordStore(out / "records"), RecordStore(out / "tuning")
    choices: list[Choice] = []
    with process_group(settings.device) as ranks:
        leads = ranks is None or ranks.rank == 0
        errors = Console(stderr=True, markup=False, highlight=False, quiet=not leads)
        for spec in specs:
            check_shares(spec.batch_size, ranks)
        with alone_first(ranks):
            store.prepare()
        try:
            with listener_for(errors) as listener:

                def series(title: str, runs: Sequence[RunSpec], where: RecordStore) -> list[RunRecord]:
                    listener.begin(title, len(runs))
                    return run_all(runs, where, listener, _maker(settings, ranks), fresh=fresh, writes=leads)

                if trials:
                    choices = choose(series("tuning", trials, tuning))
                    specs = apply_choices(specs, choices)
                records = series("comparison", specs, store)
        except KeyboardInterrupt:
            errors.print(f"interrupted; the finished runs are in {out}, the same command goes on from there")
            raise
    if leads:
        _show(settings, records, choices, goals, out, store, json=json)
    return 1 if any(record.status == "failed" for record in records) else 0


def _maker(settings: CompareSettings, ranks: Ranks | None) -> Execute:
    """How a run is made: in a process of its own, or by all processes that torchrun has started together."""
    if ranks is None:
        return lambda spec, on_epoch: execute_isolated(spec, on_epoch, timeout=settings.timeout)
    if settings.timeout is not None:
        raise InvalidOptionError(
            "--timeout ends the process of a run, and under torchrun runs have none of their own: drop it"
        )
    return execute


def _show(
    settings: CompareSettings,
    records: Sequence[RunRecord],
    choices: Sequence[Choice],
    goals: Goals,
    out: Path,
    store: RecordStore,
    *,
    json: bool,
) -> None:
    files = write_outcome(records, out, goals=goals, subtitle=_subtitle(settings, records))
    if json:
        typer.echo(result_json(records, goals, {"records": store.folder, **files}))
    else:
        console = Console(markup=False, highlight=False)
        _print_choices(console, choices)
        print_tables(console, records, goals)
        print_files(console, {"records": store.folder, "table": out / "summary.md", "report": out / "report.html"})


def _metrics(settings: CompareSettings, specs: Sequence[RunSpec]) -> dict[str, list[str]]:
    """Names of the metrics of every task; the task is only made again where a goal by one is to be checked."""
    origins = {spec.task: spec.origin() for spec in specs}
    if settings.goal_metric is None:
        return {task: [] for task in origins}
    return {task: [metric.name for metric in resolve(origin).metrics] for task, origin in origins.items()}


def _trials(settings: CompareSettings, specs: Sequence[RunSpec]) -> list[RunSpec]:
    """The tuning runs: of everything if the user asks for it, else of tasks that have no stored learning rates."""
    if settings.tune is None:
        untuned = [spec for spec in specs if spec.untuned]
        return tuning_runs(untuned, _DEFAULT_TRIALS) if untuned else []
    if settings.tune == 0:
        return []
    clash = [name for name, options in settings.options.items() if "lr" in options]
    if clash:
        raise InvalidOptionError(f"{clash[0]}.lr is set and is to be tuned too: drop one of them")
    return tuning_runs(specs, settings.tune)


def _subtitle(settings: CompareSettings, records: Sequence[RunRecord]) -> str:
    machine = records[0].environment.get("gpu") or records[0].environment.get("cpu")
    schedules = listing(sorted({record.schedule for record in records}))
    return f"{settings.seeds} seeds, {schedules} learning rate, {machine}"


def _print_choices(console: Console, choices: Sequence[Choice]) -> None:
    for choice in choices:
        lr = "no trial finished, stored one kept" if choice.lr is None else f"lr {choice.lr:g}"
        loss = "" if choice.val_loss is None else f", val loss {choice.val_loss:.3g}"
        line = (
            f"tuned {choice.task} {choice.optimizer}, batch {choice.batch_size}: {lr}{loss} "
            f"({choice.finished}/{choice.runs} tuning runs finished)"
        )
        console.print(line, soft_wrap=True)
