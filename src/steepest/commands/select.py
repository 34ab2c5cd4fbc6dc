"""`steepest select`: the samples of a task that are worth training on, and whether that pays."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from steepest.commands.options import settings_from
from steepest.commands.select_check import check_selection
from steepest.commands.select_output import print_selected, selected_json
from steepest.commands.select_progress import SelectionDisplay
from steepest.commands.select_scorer import epoch_seconds, make_scorer, new_model
from steepest.commands.select_settings import Places, SelectSettings
from steepest.errors import InvalidOptionError, SelectionError
from steepest.report.selection import write_selection_page
from steepest.report.selection_words import Scorer, Selected, cost
from steepest.report.words import listing
from steepest.selection import Selection, select_subset
from steepest.selection.method import Method
from steepest.selection.scan import FixedModel
from steepest.selection.stored import plain
from steepest.training.data import Split, Splits
from steepest.training.environment import environment_row
from steepest.training.processes import refuse_several
from steepest.training.select_options import get_method, parse_pairs
from steepest.training.selecting import reads_reference, try_out
from steepest.training.settings import merge
from steepest.training.source import resolve
from steepest.training.spec import RunSpec
from steepest.training.task import Task

__all__ = ["select", "select_settings"]


@dataclass(frozen=True, eq=False)
class _Job:
    """What a call of the command works on."""

    settings: SelectSettings
    spec: RunSpec
    task: Task
    splits: Splits
    method: Method
    places: Places
    errors: Console


def select_settings(config: Path | None, flags: Mapping[str, object], options: Sequence[str]) -> SelectSettings:
    """Settings from a file and flags.

    Args:
        config: TOML file, if any.
        flags: What was given on the command line; None says nothing.
        options: `--set` texts.

    Returns:
        The settings.
    """
    settings = settings_from(SelectSettings, config, flags)
    entry = get_method(settings.method)
    given = parse_pairs("--set", entry, entry.specs(), options)
    return merge(SelectSettings, vars(settings), {"method": entry.name, "options": given})


def select(settings: SelectSettings, *, fresh: bool, json: bool) -> int:
    """Select, write and show it.

    Args:
        settings: What to select from, and how.
        fresh: Throw away what was selected, or begun to be, under the same name.
        json: Print JSON instead of a table.

    Returns:
        The exit code.

    Raises:
        KeyboardInterrupt: If it was interrupted; the same command goes on.
    """
    refuse_several("select")
    job = _job(settings)
    job.places.prepare(fresh=fresh, weights=settings.weights)
    try:
        with _threads(settings.threads):
            selected = _selected(job)
    except KeyboardInterrupt:
        same = "the same command" + (" without --fresh" if fresh else "")
        job.errors.print(f"interrupted; {same} goes on from here ({job.places.subset})", soft_wrap=True)
        raise
    write_selection_page(selected, job.places.page)
    files = {"subset": job.places.subset, "report": job.places.words, "page": job.places.page}
    if job.places.scorer.exists():
        files["scorer"] = job.places.scorer
    if json:
        typer.echo(selected_json(selected, files))
    else:
        print_selected(Console(markup=False, highlight=False), selected, files)
    return 0


def _job(settings: SelectSettings) -> _Job:
    settings.validate()
    method, spec = settings.make_method(), settings.plan()
    task = resolve(spec.origin())
    splits = task.load(spec.data_seed)
    settings.check_amounts(spec, len(splits.train))
    return _Job(
        settings=settings,
        spec=spec,
        task=task,
        splits=splits,
        method=method,
        places=Places.of(settings, task.name),
        errors=Console(stderr=True, markup=False, highlight=False),
    )


def _selected(job: _Job) -> Selected:
    """The selection, its check, and all that is told about both."""
    needs_model = job.method.begin().passes > 0
    if job.places.subset.exists():
        _refuse_finished(job)
    model, about, epoch = None, Scorer("no model: this method looks at none"), None
    if needs_model:
        if job.settings.trains_scorer and not job.places.scorer.exists():
            kept = job.settings.kept(len(job.splits.train))
            try_out(job.method, job.task, new_model(job.spec, job.task, job.splits), job.splits, kept)
        scored = make_scorer(job.settings, job.spec, job.task, job.splits, job.places, job.errors)
        model, about, epoch = scored.model, scored.about, scored.epoch_seconds
    epoch = epoch or epoch_seconds(job.spec, job.task, job.splits)
    found = _again(job, model) if job.places.subset.exists() else _choose(job, model)
    selected = Selected(
        selection=found,
        task=job.task,
        splits=job.splits,
        scorer=about,
        epoch_seconds=epoch,
        environment=environment_row(job.spec.device),
        wrong=job.splits.train.wrong,
    )
    if not job.settings.check:
        return selected
    check = check_selection(
        found,
        job.spec,
        job.task,
        job.splits,
        seeds=job.settings.check,
        cost=cost(selected),
        kept=job.places.check,
        console=job.errors,
    )
    return replace(selected, check=check)


def _choose(job: _Job, model: nn.Module | None) -> Selection:
    settings, train = job.settings, job.splits.train
    by_reference = reads_reference(job.method)
    with SelectionDisplay(job.errors) as display, warnings.catch_warnings():
        # What it warns of is among its notes, which are printed.
        warnings.simplefilter("ignore", UserWarning)
        selection = select_subset(
            model,
            _pair(train),
            None if model is None else job.task.loss.per_sample,
            fraction=settings.fraction,
            count=settings.count,
            method=job.method,
            reference=_pair(job.splits.val) if by_reference else None,
            progress=display.told,
            checkpoint=job.places.checkpoint,
            checkpoint_every=settings.checkpoint_every,
        )
    if by_reference:
        note = "The validation split was the reference, so validation numbers of the subset are not independent of it."
        report = replace(selection.report, notes=(*selection.report.notes, note))
        selection = replace(selection, report=report)
    selection.save(job.places.subset)
    return selection


def _refuse_finished(job: _Job) -> None:
    """A selection without a page was interrupted, and a check may be added to one that is finished."""
    if job.places.page.exists() and not job.settings.check:
        raise InvalidOptionError(
            f"{job.places.subset} exists already: --fresh selects again, --check adds a check to it, or name another "
            "file with -o"
        )


def _again(job: _Job, model: nn.Module | None) -> Selection:
    """The selection that is there, if it is what these settings make."""
    path = job.places.subset
    selection = Selection.load(path, data=_pair(job.splits.train))
    wanted = {
        "method": (selection.method, job.method.name),
        "options": (selection.options, _options(job)),
        "number of samples": (len(selection), job.settings.kept(selection.num_samples)),
        "scorer": (selection.model_hash, _hash(job, model)),
    }
    other = [name for name, (found, now) in wanted.items() if found != now]
    if other:
        raise SelectionError(
            f"{path} exists already and is another selection than these settings make (its {listing(other)} differ"
            f"{'s' if len(other) == 1 else ''}): --fresh selects again, or name another file with -o"
        )
    job.errors.print(f"going on with the selection in {path}", soft_wrap=True)
    return selection


def _options(job: _Job) -> dict[str, object]:
    """Options of the method as a stored selection has them."""
    names = get_method(job.settings.method).specs()
    return {name: plain(getattr(job.method, name)) for name in names}


def _hash(job: _Job, model: nn.Module | None) -> str:
    return "" if model is None else FixedModel(model, job.method.scope, job.task.loss.per_sample).fingerprint


def _pair(split: Split) -> tuple[Tensor, Tensor]:
    return split.inputs, split.targets


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
