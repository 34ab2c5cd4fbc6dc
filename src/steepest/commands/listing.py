"""`steepest list`: what there is to train, and what each optimizer and each selection method takes."""

from collections.abc import Mapping

import typer

from steepest.training.convert import describe
from steepest.training.models import MODELS
from steepest.training.options import OptionSpec
from steepest.training.registry import optimizers, tasks
from steepest.training.selections import METHODS, TIMES
from steepest.training.task import FileTask

__all__ = ["print_lists"]


def print_lists() -> None:
    """Print tasks, models, optimizers and selection methods, with their options."""
    width = max(map(len, tasks()))
    typer.echo("tasks:")
    for task in tasks().values():
        typer.echo(f"  {task.name:<{width}} {task.description}")
        if isinstance(task, FileTask):
            typer.echo(f"  {'':<{width}} reads {task.files} in the folder that --data or STEEPEST_DATA names")
    typer.echo("  a table of your own: data.csv --target COLUMN; a task of your own: module:attribute")
    typer.echo(
        f"\nmodels: the task's own, or --model {', '.join(f'{name}:NUMBERS' for name in MODELS)}, or module:attribute"
    )
    typer.echo("\noptimizers, with what --set OPTIMIZER.OPTION=VALUE takes:")
    for entry in optimizers().values():
        typer.echo(f"  {entry.name:<{width}} {entry.description}")
        _print_options(entry.specs())
    typer.echo(
        "\nselection methods, with what --select METHOD:FRACTION[:OPTION=VALUE...] of train and compare takes, and "
        "--set OPTION=VALUE of select:"
    )
    for method in METHODS.values():
        typer.echo(f"  {method.name:<{width}} {method.description}")
        _print_options(method.specs())
    typer.echo(
        f"  {'(each)':<{width}} with --select: epochs before the first selection, and from one to the next (0: one)"
    )
    _print_options(TIMES)


def _print_options(specs: Mapping[str, OptionSpec]) -> None:
    for spec in specs.values():
        typer.echo(f"    {spec.name:<24} {describe(spec.annotation)} (default {spec.default})")
