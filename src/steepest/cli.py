"""The command line: parse, call, exit code. Heavy imports wait until a command needs them."""

import json as json_module
import os
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

from steepest.errors import SteepestError

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        if os.environ.get("RANK", "0") == "0":  # of several processes one tells it
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
    """Print the tasks, the models, the optimizers and selection methods, and the options of each."""
    del debug
    from steepest.commands.listing import print_lists

    print_lists()


_Epochs = Annotated[int | None, typer.Option(help="Epochs per run; each task has its own default.")]
_Budget = Annotated[
    float | None,
    typer.Option("--budget-seconds", help="Training seconds per run, instead of epochs or besides them."),
]
_Schedule = Annotated[
    str | None,
    typer.Option(
        help="Learning rate: linear (falls to 0, the default), trapezoidal (falls from three fifths on), constant, or "
        "auto (linear, but constant for solvers that find the lengths of their steps; the default of equations)."
    ),
]
_BatchSize = Annotated[
    str | None,
    typer.Option(help="Samples per step, or all for the whole training split; each task has its own default."),
]
_DataSeed = Annotated[int | None, typer.Option(help="Seed of the splits (default 0).")]
_Device = Annotated[str | None, typer.Option(help="Torch device, such as cpu (the default) or cuda.")]
_Threads = Annotated[int | None, typer.Option(help="Threads of torch on CPU (default 1).")]
_Data = Annotated[
    str | None, typer.Option(help="Folder of the data sets that are files (else STEEPEST_DATA), or a table of yours.")
]
_Target = Annotated[
    str | None, typer.Option(help="Table of yours: column with the targets, by name or place (-1 is the last).")
]
_Kind = Annotated[
    str | None, typer.Option(help="Table of yours: classification or regression; inferred and told without it.")
]
_Ignore = Annotated[str | None, typer.Option(metavar="COL,COL", help="Table of yours: columns to leave out.")]
_DropMissing = Annotated[
    bool | None, typer.Option("--drop-missing", help="Table of yours: leave out rows with empty cells.")
]
_Model = Annotated[
    str | None, typer.Option(help="Instead of the task's own: mlp:64,64, cnn:16,32, resnet:16,32 or module:attribute.")
]
_Goal = Annotated[
    list[str] | None,
    typer.Option(metavar="[TASK=]VALUE", help="Validation loss or metric to time; else what Adam's runs all reach."),
]
_GoalMetric = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Metric that the goal is a value of, such as accuracy (default val_loss)."),
]
_Config = Annotated[Path | None, typer.Option(help="TOML file with these settings, - written as _; flags override it.")]


@app.command(
    help="Make one run. A checkpoint is written every 30 seconds and on Ctrl-C; --resume goes on from it, and on CPU "
    "ends bit for bit with the numbers of a run that was never stopped."
)
def train(
    task: Annotated[
        str | None, typer.Argument(help="A task of `steepest list`, a table (CSV, NPZ), or module:attribute.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option("--optimizer", "-o", help="Optimizer (default sven).")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Option of the optimizer.")
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD:FRACTION[:NAME=VALUE...]",
            help="Train on a subset, as in sage:0.1, with as many steps as on everything; warmup=N sets the epochs "
            "before it is selected (default 1), every=N selects anew.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initialisation and data order (default 0).")] = None,
    epochs: _Epochs = None,
    budget_seconds: _Budget = None,
    schedule: _Schedule = None,
    batch_size: _BatchSize = None,
    data_seed: _DataSeed = None,
    device: _Device = None,
    threads: _Threads = None,
    data: _Data = None,
    target: _Target = None,
    kind: _Kind = None,
    ignore: _Ignore = None,
    drop_missing: _DropMissing = None,
    model: _Model = None,
    config: _Config = None,
    out: Annotated[
        str | None, typer.Option(help="Folder for record, model, checkpoints, report (runs/train/TASK-OPTIMIZER).")
    ] = None,
    checkpoint_every: Annotated[
        float | None, typer.Option(help="Wall-clock seconds between checkpoints (default 30).")
    ] = None,
    keep_checkpoints: Annotated[int | None, typer.Option(help="How many checkpoints stay (default 2).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint, if there is one.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away checkpoint and record of this run.")] = False,
    json: Annotated[bool, _JSON] = False,
    debug: Annotated[bool, _DEBUG] = False,
) -> int:
    """Make one run.

    Returns:
        The exit code: 1 if the run failed or diverged.
    """
    del debug
    flags = {**locals(), "ignore": _names(ignore), "batch_size": _size(batch_size)}
    from steepest.commands.train import train as train_command
    from steepest.commands.train import train_settings

    settings = train_settings(config, _only_settings(flags), set_ or [], resume=resume)
    return train_command(settings, resume=resume, fresh=fresh, json=json)


@app.command(
    help="Train every optimizer on every task with the same budget and show who won. Runs that are recorded in the "
    "output folder are not repeated: an interrupted comparison goes on where it was."
)
def compare(
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Tasks of `steepest list`, tables (CSV, NPZ), or module:attribute.")
    ] = None,
    optimizers: Annotated[
        str | None, typer.Option("--optimizers", "-o", help="Separated by commas (default sven,sgd,adam,lbfgs).")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds: 0, 1, 2, ... (default 3)")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="OPT.NAME=VALUE", help="Option of an optimizer.")
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD:FRACTION[:NAME=VALUE...]",
            help="Compare training on subsets too: give it several times, none for everything. See steepest list.",
        ),
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option(
            help="Choose each learning rate by this many trials on other seeds; 0 for none. Without it, 5 on tasks "
            "that have no stored ones."
        ),
    ] = None,
    goal: _Goal = None,
    goal_metric: _GoalMetric = None,
    epochs: _Epochs = None,
    budget_seconds: _Budget = None,
    schedule: _Schedule = None,
    batch_size: _BatchSize = None,
    batch_sizes: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Compare at each of these batch sizes: a large-batch study.")
    ] = None,
    data_seed: _DataSeed = None,
    device: _Device = None,
    threads: _Threads = None,
    timeout: Annotated[float | None, typer.Option(help="Wall-clock seconds after which a run is given up.")] = None,
    data: _Data = None,
    target: _Target = None,
    kind: _Kind = None,
    ignore: _Ignore = None,
    drop_missing: _DropMissing = None,
    model: _Model = None,
    config: _Config = None,
    out: Annotated[str | None, typer.Option(help="Folder for records, tables, report (runs/compare).")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Repeat runs that are recorded already.")] = False,
    json: Annotated[bool, _JSON] = False,
    debug: Annotated[bool, _DEBUG] = False,
) -> int:
    """Train every optimizer on every task with the same budget and show who won.

    Returns:
        The exit code: 1 if a run failed.
    """
    del debug
    flags = {**locals(), "tasks": tasks or None, "optimizers": _names(optimizers), "ignore": _names(ignore)}
    flags |= {
        "select": select or None,
        "batch_size": _size(batch_size),
        "batch_sizes": [_size(size) for size in _names(batch_sizes) or []] or None,
    }
    from steepest.commands.compare import compare as compare_command
    from steepest.commands.options import parse_goals, parse_settings, settings_from
    from steepest.training.settings import CompareSettings

    flags = _only_settings(flags) | {"options": parse_settings(set_ or []), "goal": parse_goals(goal or [])}
    return compare_command(settings_from(CompareSettings, config, flags), fresh=fresh, json=json)


@app.command(
    help="Choose the samples of a task that are worth training on, by the gradients of a model trained for a while, "
    "and say after how much training that has paid. After Ctrl-C the same command goes on where it was."
)
def select(
    task: Annotated[
        str | None, typer.Argument(help="A task of `steepest list`, a table (CSV, NPZ), or module:attribute.")
    ] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the training samples to keep, such as 0.1.")] = None,
    count: Annotated[int | None, typer.Option(help="Number of samples to keep, instead of a share.")] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="The NPZ file; JSON and page beside it (runs/select/TASK-METHOD.npz)."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="sage (the default), random, el2n, grand, herding, kcenter, gradmatch.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Option of the method.")] = None,
    warmup: Annotated[
        int | None, typer.Option(metavar="EPOCHS", help="Train the scorer for this long (default 2).")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="Instead: score with a model.pt that train wrote.")
    ] = None,
    check: Annotated[
        int | None,
        typer.Option(
            metavar="SEEDS",
            help="Train fresh models on the subset, on random ones and on everything, at equal steps: did it pay?",
        ),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="Optimizer of the scorer and of the check (default adamw).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the scorer (default 0).")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of the check, in steps of everything; each task has its own default.")
    ] = None,
    schedule: _Schedule = None,
    batch_size: _BatchSize = None,
    data_seed: _DataSeed = None,
    device: _Device = None,
    threads: _Threads = None,
    data: _Data = None,
    target: _Target = None,
    kind: _Kind = None,
    ignore: _Ignore = None,
    drop_missing: _DropMissing = None,
    model: _Model = None,
    config: _Config = None,
    checkpoint_every: Annotated[
        float | None, typer.Option(help="Wall-clock seconds between checkpoints (default 30).")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what is there under this name.")] = False,
    json: Annotated[bool, _JSON] = False,
    debug: Annotated[bool, _DEBUG] = False,
) -> int:
    """Choose the samples of a task that are worth training on.

    Returns:
        The exit code.
    """
    del debug
    flags = {**locals(), "ignore": _names(ignore), "batch_size": _size(batch_size)}
    from steepest.commands.select import select as select_command
    from steepest.commands.select import select_settings

    settings = select_settings(config, _only_settings(flags), set_ or [])
    return select_command(settings, fresh=fresh, json=json)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that train or compare wrote.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The HTML file (report.html in the first folder).")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the report.")] = None,
    goal: _Goal = None,
    goal_metric: _GoalMetric = None,
    json: Annotated[bool, _JSON] = False,
    debug: Annotated[bool, _DEBUG] = False,
) -> int:
    """Write one HTML file about all runs in some folders.

    Returns:
        The exit code.
    """
    del debug
    from steepest.commands.options import parse_goals
    from steepest.commands.report import report as report_command

    return report_command(folders, out, title=title, goal=parse_goals(goal or []), goal_metric=goal_metric, json=json)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _size(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.strip().lstrip("-").isdecimal() else text


def _only_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that are settings: what steers this one call of the command is none."""
    return {name: value for name, value in flags.items() if name not in _STEERING}


_STEERING = {"set_", "config", "resume", "fresh", "json", "debug"}


if __name__ == "__main__":
    main()
