"""`steepest select`: the samples of a task that are worth training on, and whether that pays.

Under torchrun all processes do the same; the first one alone writes files and prints.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import typer
from rich.console import Console
from torch import nn

from steepest.commands.options import settings_from
from steepest.commands.select_again import go_on, refuse_finished
from steepest.commands.select_check import check_selection
from steepest.commands.select_job import Job, make_job, pair
from steepest.commands.select_output import print_selected, selected_json
from steepest.commands.select_progress import SelectionDisplay
from steepest.commands.select_scorer import epoch_seconds, make_scorer, new_model
from steepest.commands.select_settings import SelectSettings
from steepest.commands.select_shared import ignore_signals, is_there, leads, signals_held_back
from steepest.distributed.ranks import RankError
from steepest.report.selection import write_selection_page
from steepest.report.selection_words import Scorer, Selected, cost
from steepest.selection import Keep, Selection, select_subset
from steepest.selection.together import Together, attempt
from steepest.training.environment import environment_row
from steepest.training.processes import check_shares, if_lost, launched, process_group
from steepest.training.select_options import get_method, parse_pairs
from steepest.training.selecting import reads_reference, try_out
from steepest.training.settings import merge

__all__ = ["select", "select_settings"]


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
        RankError: If another process failed.
    """
    # A device that cannot be used is told by the settings' check, and not where the processes look for each other.
    device = settings.device if torch.cuda.is_available() else "cpu"
    same = "the same command" + (" without --fresh" if fresh else "")
    job = None
    with ExitStack() as stack:
        ranks = stack.enter_context(process_group(device))
        together = None if ranks is None else Together(ranks)
        let_through = stack.enter_context(signals_held_back(together))
        try:
            with attempt(together):
                job = make_job(settings, together, let_through)
                check_shares(job.spec.batch_size, ranks)
                if leads(together):
                    job.places.prepare(fresh=fresh, weights=settings.weights)
            with _threads(settings.threads), if_lost(lambda: f"{same} goes on"):
                selected = _selected(job)
            if together is not None:
                together.asked = lambda: False  # all is done but the page
            with attempt(together):
                if leads(together):
                    _show(job, selected, json=json)
            if launched() > 1:
                ignore_signals()  # all is done
        except (KeyboardInterrupt, RankError) as error:
            if isinstance(error, RankError) and not error.interrupted:
                raise
            if launched() > 1:
                ignore_signals()  # what torchrun sends to those that are about to end
            if job is not None:
                job.errors.print(f"interrupted; {same} goes on from here ({job.places.subset})", soft_wrap=True)
            raise KeyboardInterrupt from error
    return 0


def _show(job: Job, selected: Selected, *, json: bool) -> None:
    write_selection_page(selected, job.places.page)
    files = {"subset": job.places.subset, "report": job.places.words, "page": job.places.page}
    if job.places.scorer.exists():
        files["scorer"] = job.places.scorer
    if json:
        typer.echo(selected_json(selected, files))
    else:
        print_selected(Console(markup=False, highlight=False), selected, files)


def _selected(job: Job) -> Selected:
    """The selection, its check, and all that is told about both."""
    needs_model = job.method.begin().passes > 0
    together = job.together
    finished = is_there(job.places.subset, together)
    if finished:
        refuse_finished(job)
    model, about, epoch = None, Scorer("no model: this method looks at none"), None
    if needs_model:
        if job.settings.trains_scorer and not is_there(job.places.scorer, together):
            with attempt(together):
                kept = job.settings.kept(len(job.splits.train))
                try_out(job.method, job.task, new_model(job.spec, job.task, job.splits), job.splits, kept)
        scored = make_scorer(job.settings, job.spec, job.task, job.splits, job.places, job.errors, together)
        model, about, epoch = scored.model, scored.about, scored.epoch_seconds
    epoch = epoch or epoch_seconds(job.spec, job.task, job.splits, None if together is None else together.ranks)
    found = go_on(job, model) if finished else _choose(job, model)
    selected = Selected(
        selection=found,
        task=job.task,
        splits=job.splits,
        scorer=about,
        epoch_seconds=epoch,
        environment=_environment(job),
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
        together=together,
    )
    return replace(selected, check=check)


def _environment(job: Job) -> dict[str, str | int | None]:
    row = environment_row(job.spec.device)
    return row if job.together is None else {**row, "processes": job.together.ranks.size}


def _choose(job: Job, model: nn.Module | None) -> Selection:
    settings, train = job.settings, job.splits.train
    by_reference = reads_reference(job.method)
    with SelectionDisplay(job.errors) as display, job.let_through(), warnings.catch_warnings():
        # What it warns of is among its notes, which are printed.
        warnings.simplefilter("ignore", UserWarning)
        selection = select_subset(
            model,
            pair(train),
            None if model is None else job.task.loss.per_sample,
            fraction=settings.fraction,
            count=settings.count,
            method=job.method,
            reference=pair(job.splits.val) if by_reference else None,
            progress=display.told,
            checkpoint=Keep(
                job.places.checkpoint,
                settings.checkpoint_every,
                say=lambda text: job.errors.print(text, soft_wrap=True),
            ),
        )
    if by_reference:
        note = "The validation split was the reference, so validation numbers of the subset are not independent of it."
        report = replace(selection.report, notes=(*selection.report.notes, note))
        selection = replace(selection, report=report)
    with attempt(job.together):
        selection.save(job.places.subset)  # which the first process does
    return selection


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
