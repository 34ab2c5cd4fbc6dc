"""A selection that `steepest select` finds under its name: refused, or gone on with."""

from torch import nn

from steepest.commands.select_job import Job, pair
from steepest.commands.select_shared import is_there
from steepest.errors import InvalidOptionError, SelectionError
from steepest.report.words import listing
from steepest.selection.result import Selection
from steepest.selection.scan import FixedModel
from steepest.selection.stored import plain
from steepest.selection.together import attempt
from steepest.training.select_options import get_method

__all__ = ["go_on", "refuse_finished"]


def refuse_finished(job: Job) -> None:
    """Refuse to select what was selected.

    A selection without a page was interrupted, and a check may be added to one that is finished.

    Args:
        job: The job.

    Raises:
        InvalidOptionError: If it is finished, and no check is to be added.
    """
    if is_there(job.places.page, job.together) and not job.settings.check:
        raise InvalidOptionError(
            f"{job.places.subset} exists already: --fresh selects again, --check adds a check to it, or name another "
            "file with -o"
        )


def go_on(job: Job, model: nn.Module | None) -> Selection:
    """Read the selection that is there, if it is what these settings make.

    Args:
        job: The job.
        model: The scorer, or None.

    Returns:
        The selection.
    """
    path = job.places.subset
    with attempt(job.together):
        selection = Selection.load(path, data=pair(job.splits.train))
        _check_wanted(job, selection, model)
    job.errors.print(f"going on with the selection in {path}", soft_wrap=True)
    return selection


def _check_wanted(job: Job, selection: Selection, model: nn.Module | None) -> None:
    wanted = {
        "method": (selection.method, job.method.name),
        "options": (selection.options, _options(job)),
        "number of samples": (len(selection), job.settings.kept(selection.num_samples)),
        "scorer": (selection.model_hash, _hash(job, model)),
    }
    other = [name for name, (found, now) in wanted.items() if found != now]
    if other:
        raise SelectionError(
            f"{job.places.subset} exists already and is another selection than these settings make (its "
            f"{listing(other)} differ{'s' if len(other) == 1 else ''}): --fresh selects again, or name another file "
            "with -o"
        )


def _options(job: Job) -> dict[str, object]:
    """Options of the method as a stored selection has them."""
    names = get_method(job.settings.method).specs()
    return {name: plain(getattr(job.method, name)) for name in names}


def _hash(job: Job, model: nn.Module | None) -> str:
    return "" if model is None else FixedModel(model, job.method.scope, job.task.loss.per_sample).fingerprint
