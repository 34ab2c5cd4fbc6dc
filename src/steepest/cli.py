"""The command line: parse, call, exit code. Heavy imports wait until a command needs them."""

import json as json_module
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit(
        f"steepest: the command line needs {error.name}, which is not installed: pip install 'steepest[cli]'"
    ) from error

from steepest.errors import InvalidOptionError, SteepestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from steepest.training.compare import Request
    from steepest.training.records import RunRecord
    from steepest.training.spec import RunSpec

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="steepest",
    help="Train with geometry-aware optimizers and see which one pays on your problem.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_DEBUG = typer.Option("--debug", help="Show the traceback of an error.")
_JSON = typer.Option("--json", help="Print JSON on standard output; progress goes to standard error.")


def main() -> None:
    """Entry point of the `steepest` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: "Sequence[str]") -> int:
    """Run the command line and turn every error into one line and an exit code.

    Args:
        arguments: What follows the program's name.

    Returns:
        0 done, 1 a run failed, 2 bad input, 130 interrupted.
    """
    try:
        return int(app(args=list(arguments), prog_name="steepest", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        code, message = _explain(error)
        sys.stderr.write(f"steepest: {' '.join(message.split())}\n")
        return code


def _explain(error: Exception) -> tuple[int, str]:
    if isinstance(error, SteepestError):
        return 2, str(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return 2, f"{place}{error.strerror or error}"
    # typer brings its own copy of click in some versions and imports click in others: both have this method.
    if hasattr(error, "format_message"):
        return 2, f"{error.format_message()} (steepest --help lists what there is)"
    return 1, f"internal error, {type(error).__name__}: {error} (--debug shows where)"


def _version(value: bool) -> None:
    if value:
        from steepest import __version__

        typer.echo(f"steepest {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command()
def env(json: Annotated[bool, _JSON] = False, debug: Annotated[bool, _DEBUG] = False) -> None:
    """Print the versions and the machine that a record would carry."""
    del debug
    from steepest.training.environment import environment_row

    row = environment_row()
    if json:
        typer.echo(json_module.dumps(row))
        return
    for name, value in row.items():
        typer.echo(f"{name:<10} {'-' if value is None else value}")


@app.command(name="list")
def list_(debug: Annotated[bool, _DEBUG] = False) -> None:
    """Print the tasks, the optimizers and the options of each optimizer."""
    del debug
    from steepest.training.convert import describe
    from steepest.training.registry import optimizers, tasks

    typer.echo("tasks:")
    for task in tasks().values():
        typer.echo(f"  {task.name:<14} {task.description}")
    typer.echo("\noptimizers, with what --set OPTIMIZER.OPTION=VALUE takes:")
    for entry in optimizers().values():
        typer.echo(f"  {entry.name:<14} {entry.description}")
        for spec in entry.specs().values():
            typer.echo(f"    {spec.name:<24} {describe(spec.annotation)} (default {spec.default})")


@app.command(
    help="Train every optimizer on every task with the same budget and show who won. Runs that are recorded in the "
    "output folder are not repeated: an interrupted comparison goes on where it was."
)
def compare(
    tasks: Annotated[list[str], typer.Argument(help="Tasks, as `steepest list` names them.")],
    optimizers: Annotated[
        str, typer.Option("--optimizers", "-o", help="Optimizers, separated by commas.")
    ] = "sven,sgd,adam,lbfgs",
    seeds: Annotated[int, typer.Option(help="Number of seeds: 0, 1, 2, ...")] = 3,
    epochs: Annotated[int | None, typer.Option(help="Epochs per run; each task has its own default.")] = None,
    budget_seconds: Annotated[
        float | None, typer.Option(help="Training seconds per run, instead of epochs or besides them.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="OPT.NAME=VALUE", help="Option of an optimizer.")
    ] = None,
    tune: Annotated[
        int | None, typer.Option(help="Choose each learning rate by this many trials on other seeds.")
    ] = None,
    schedule: Annotated[str, typer.Option(help="Learning rate: linear (falls to 0) or constant.")] = "linear",
    batch_size: Annotated[int | None, typer.Option(help="Samples per step.")] = None,
    data_seed: Annotated[int, typer.Option(help="Seed of the splits.")] = 0,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of torch on CPU.")] = 1,
    timeout: Annotated[float | None, typer.Option(help="Wall-clock seconds after which a run is given up.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for records, tables and plots.")] = Path("runs/compare"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Repeat runs that are recorded already.")] = False,
    json: Annotated[bool, _JSON] = False,
    debug: Annotated[bool, _DEBUG] = False,
) -> int:
    """Train every optimizer on every task with the same budget and show who won.

    Returns:
        The exit code: 1 if a run failed.
    """
    del debug
    from steepest.training.compare import Request

    request = Request(
        tasks=tasks,
        optimizers=_names(optimizers),
        seeds=range(seeds),
        epochs=epochs,
        seconds=budget_seconds,
        options=_parse_settings(set_ or []),
        schedule=_schedule(schedule),
        batch_size=batch_size,
        data_seed=data_seed,
        device=device,
        threads=threads,
    )
    return _compare(request, out, tune=tune, timeout=timeout, fresh=fresh, json=json)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _schedule(text: str) -> Any:
    from steepest.training.errors import UnknownNameError, unknown

    if text not in {"linear", "constant"}:
        raise UnknownNameError(unknown("schedule", text, ["linear", "constant"]))
    return text


def _parse_settings(settings: "Sequence[str]") -> dict[str, dict[str, object]]:
    from steepest.training.options import parse_value
    from steepest.training.registry import get_optimizer

    parsed: dict[str, dict[str, object]] = {}
    for setting in settings:
        target, equals, text = setting.partition("=")
        optimizer, dot, name = target.strip().partition(".")
        if not (equals and dot and name):
            raise InvalidOptionError(f"--set {setting!r}: write OPTIMIZER.OPTION=VALUE, as in sven.lr=0.5")
        spec = get_optimizer(optimizer).specs().get(name)
        parsed.setdefault(optimizer, {})[name] = parse_value(text, spec.annotation if spec else Any)
    return parsed


def _compare(request: "Request", out: Path, *, tune: int | None, timeout: float | None, fresh: bool, json: bool) -> int:
    from rich.console import Console

    from steepest.report.live import listener_for
    from steepest.report.outcome import write_outcome
    from steepest.training.compare import plan_runs, run_all
    from steepest.training.isolate import execute_isolated
    from steepest.training.records import RecordStore
    from steepest.training.tune import apply_choices, choose, tuning_runs

    if timeout is not None and not 0 < timeout < float("inf"):
        raise InvalidOptionError(f"the timeout is {timeout}: it must be a finite number above 0")
    specs = plan_runs(request)
    if tune is not None:
        _refuse_set_lr(request)
    trials = tuning_runs(specs, tune) if tune is not None else []
    store = RecordStore(out / "records")
    errors = Console(stderr=True, markup=False, highlight=False)
    try:
        with listener_for(errors) as listener:

            def series(title: str, runs: "Sequence[RunSpec]", where: RecordStore) -> "list[RunRecord]":
                listener.begin(title, len(runs))
                make = lambda spec, on_epoch: execute_isolated(spec, on_epoch, timeout=timeout)  # noqa: E731
                return run_all(runs, where, listener, make, fresh=fresh)

            if tune is not None:
                choices = choose(series("tuning", trials, RecordStore(out / "tuning")))
                specs = apply_choices(specs, choices)
            records = series("comparison", specs, store)
    except KeyboardInterrupt:
        errors.print(f"interrupted; the finished runs are in {out}, the same command goes on from there")
        raise
    files = write_outcome(records, out, subtitle=_subtitle(request, records))
    if json:
        typer.echo(_json_result(records, {name: [str(p) for p in paths] for name, paths in files.items()}))
    else:
        console = Console(markup=False, highlight=False)
        if tune is not None:
            _print_choices(console, choices)
        _print_result(console, request, records, out, tuned=tune is not None)
    return 1 if any(record.status == "failed" for record in records) else 0


def _refuse_set_lr(request: "Request") -> None:
    clash = [name for name, options in (request.options or {}).items() if "lr" in options]
    if clash:
        raise InvalidOptionError(f"--set {clash[0]}.lr and --tune both choose the learning rate: drop one of them")


def _subtitle(request: "Request", records: "Sequence[RunRecord]") -> str:
    cpu = records[0].environment.get("gpu") or records[0].environment.get("cpu")
    return f"median and range of {len(request.seeds)} seeds, {request.schedule} learning rate, {cpu}"


def _json_result(records: "Sequence[RunRecord]", files: dict[str, list[str]]) -> str:
    from steepest.report.summary import summarise
    from steepest.report.table import summary_json

    return json_module.dumps({"schema": 1, "tasks": summary_json(summarise(records)), "files": files})


def _print_choices(console: "Console", choices: "Sequence[Any]") -> None:
    for choice in choices:
        lr = "no trial finished, stored one kept" if choice.lr is None else f"lr {choice.lr:g}"
        loss = "" if choice.val_loss is None else f", val loss {choice.val_loss:.3g}"
        line = (
            f"tuned {choice.task} {choice.optimizer}: {lr}{loss} ({choice.finished}/{choice.runs} tuning runs finished)"
        )
        console.print(line, soft_wrap=True)


def _print_result(
    console: "Console", request: "Request", records: "Sequence[RunRecord]", out: Path, *, tuned: bool
) -> None:
    from steepest.report.summary import summarise
    from steepest.report.table import print_task_table
    from steepest.training.registry import get_task

    changed = [f"{name}.{option}" for name, options in (request.options or {}).items() for option in options]
    for summary in summarise(records):
        task = get_task(summary.task)
        source = "learning rates: tuned in this command" if tuned else task.options_source
        source += f"; changed with --set: {', '.join(changed)}" if changed else ""
        console.print()
        title = f"{task.name} - {task.description}"
        print_task_table(console, summary, title=title, caption=source)
    console.print(
        f"Mean ± standard deviation over the finished runs of {len(request.seeds)} seeds; * is the best of a column. "
        "The clock leaves out evaluation, data loading and warm-up; peak memory is the tensors of a step beyond model "
        "and data.",
        soft_wrap=True,
    )
    console.print(f"\nrecords  {out / 'records'}\ntable    {out / 'summary.md'}", soft_wrap=True)
    for summary in summarise(records):
        console.print(f"plot     {out / 'plots' / summary.task}.svg (and .png)", soft_wrap=True)


if __name__ == "__main__":
    main()
