"""The end of a selection: the choice, a look at what was kept, and the report."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from steepest.errors import CaptureError, SelectionError, UnsupportedModelError
from steepest.selection.arguments import Amount
from steepest.selection.joining import from_first
from steepest.selection.method import Method, Picked, Run
from steepest.selection.notes import class_counts, class_notes
from steepest.selection.passes import Passes
from steepest.selection.report import SelectionReport
from steepest.selection.result import Selection
from steepest.selection.review import Review
from steepest.selection.review import review as look
from steepest.selection.samples import Samples
from steepest.selection.scan import FixedModel
from steepest.selection.share import Share
from steepest.selection.stored import plain
from steepest.selection.together import Together

__all__ = ["assemble", "choose", "look_at", "options_of"]

_NOT_COMPARED = "The gradients of the kept samples were not compared"


def options_of(method: Method) -> dict[str, Any]:
    """Options of a method in plain values."""
    content = plain(method)
    if not isinstance(content, dict):  # somebody's own method that is no dataclass
        return {"method": content}
    return {name: value for name, value in content.items() if name != "type"}


def choose(passes: Passes, run: Run, method: Method, amount: Amount, together: Together | None) -> Picked:
    """Let the method choose; of several processes the first one does, and tells the others.

    Args:
        passes: The passes, done.
        run: The method's.
        method: The method.
        amount: How many.
        together: The processes, or None.

    Returns:
        The choice.
    """
    if together is None:
        return _pick(passes, run, method, amount)
    # What the first decides cannot differ between processes.
    picked = together.waiting(lambda pulse: _pick(passes, run, method, amount, pulse))
    held = {name: getattr(picked, name, None) for name in ("indices", "scores", "weights")}
    arrays = from_first({name: array for name, array in held.items() if array is not None}, together)
    notes, numbers = together.one(None if picked is None else (picked.notes, dict(picked.numbers)))
    return Picked(arrays["indices"], arrays.get("scores"), arrays["weights"], notes, numbers)


def _pick(passes: Passes, run: Run, method: Method, amount: Amount, pulse: Callable[[], None] = lambda: None) -> Picked:
    began = time.monotonic()
    number = passes.num_samples or 0
    count = amount.of(number)

    def tell(done: int, total: int) -> None:
        passes.tell_pick(done, total, time.monotonic() - began)
        pulse()

    run.tell = tell
    picked = run.pick(count, passes.labels)
    indices = picked.indices
    right = len(indices) == count == len(picked.weights) and bool((indices.diff() > 0).all())
    if not right or int(indices[0]) < 0 or int(indices[-1]) >= number:
        raise SelectionError(
            f"{method} returned {len(indices)} positions and {len(picked.weights)} weights: a method must pick {count} "
            f"ascending positions below {number}, with a weight for each."
        )
    passes.seconds += time.monotonic() - began
    return picked


def look_at(
    data: Any,
    samples: Samples | Share,
    picked: Picked,
    fixed: FixedModel | None,
    passes: Passes,
    run: Run,
    notes: list[str],
    together: Together | None,
) -> Review:
    """Go through the kept samples, with gradients where the model gives them.

    Args:
        data: What the user gave.
        samples: Its samples, or those of this process.
        picked: The choice.
        fixed: The model, entered, or None.
        passes: Told.
        run: The method's.
        notes: Of the report; gets another where gradients cannot be compared.
        together: The processes, or None.

    Returns:
        What was found.

    Raises:
        CaptureError: If the losses do not depend on the scope of a method that needs it.
        UnsupportedModelError: If the model has no gradients of samples, and the method needs them.
    """
    if together is not None and not run.passes:
        fixed = _usable(fixed, samples, notes, together)
    try:
        return look(data, samples, picked.indices, fixed, passes.tell_review, together)
    except (UnsupportedModelError, CaptureError) as error:
        if run.passes or together is not None:
            raise
        # The method needed no gradients: that there are none must not keep it from its choice.
        notes.append(f"{_NOT_COMPARED}: {error}")
        return look(data, samples, picked.indices, None, passes.tell_review)


def _usable(
    fixed: FixedModel | None, samples: Samples | Share, notes: list[str], together: Together
) -> FixedModel | None:
    """Try the model on a batch of every process; where one cannot have gradients, none compares them."""
    problem = ""
    with together.attempt():
        batch = next(samples.batches(), None)
        try:
            if fixed is not None and batch is not None:
                fixed.rows(batch)
        except (UnsupportedModelError, CaptureError) as error:
            problem = f"{_NOT_COMPARED}: {error}"
    problems = [text for text in together.told(problem) if text]
    notes += problems[:1]
    return None if problems else fixed


def assemble(
    picked: Picked,
    passes: Passes,
    seen: Review | None,
    method: Method,
    run: Run,
    model_hash: str,
    notes: list[str],
    together: Together | None,
) -> Selection:
    """Put all together; of several processes the first one's report is everybody's.

    Args:
        picked: The choice.
        passes: The passes.
        seen: What the review found, or None.
        method: The method.
        run: Its run.
        model_hash: Of the model, empty where it was not looked at.
        notes: For the report.
        together: The processes, or None.

    Returns:
        The selection.
    """
    counts = class_counts(passes.labels, picked.indices)
    report = SelectionReport(
        seconds=passes.seconds,
        review_seconds=seen.seconds if seen else 0.0,
        passes=run.passes,
        estimate=passes.estimate,
        class_counts=counts,
        mean_cosine=seen.mean_cosine if seen else None,
        duplicates=seen.duplicates if seen else None,
        numbers=dict(picked.numbers),
        notes=(*picked.notes, *class_notes(counts, len(picked.indices)), *notes),
        kept=len(picked.indices),
        num_samples=passes.num_samples or 0,
    )
    if together is not None:
        report = together.one(
            dataclasses.replace(report, processes=together.ranks.size, traffic=together.traffic)
            if together.leads
            else None
        )
    return Selection(
        indices=picked.indices.cpu(),
        scores=None if picked.scores is None else picked.scores.cpu(),
        weights=picked.weights.cpu(),
        labels=passes.labels,
        method=method.name,
        options=options_of(method),
        num_samples=passes.num_samples or 0,
        fingerprint=passes.fingerprint,
        model_hash=model_hash,
        report=report,
        writes=together is None or together.leads,
    )
