"""The page of a selection: one HTML file that needs nothing but itself."""

from pathlib import Path

from steepest._files import write_atomically
from steepest._versions import package_version
from steepest.report.charts import Charts
from steepest.report.grids import Entry, Grid, environment_grid
from steepest.report.selection_check import Check, check_grid, check_verdict
from steepest.report.selection_examples import examples
from steepest.report.selection_figures import selection_figures, selection_legend
from steepest.report.selection_words import Selected, cost_words, kept_words, meanings, wrong_words
from steepest.report.sheet import page_sheet, page_template
from steepest.report.words import count, memory, number, option_text
from steepest.selection import SelectionReport

__all__ = ["render_selection", "write_selection_page"]

# Tables of more classes say less than their figure.
_MOST_CLASSES = 30


def render_selection(selected: Selected, *, title: str | None = None) -> str:
    """Make the page.

    Args:
        selected: The selection and all that is told about it.
        title: Heading of the page; None makes one.

    Returns:
        HTML; the same selection gives the same text.
    """
    selection, task, charts = selected.selection, selected.task, Charts()
    # The legend first: it fixes which colour is which variable of the style sheet.
    chips, figures = selection_legend(charts), selection_figures(selected, charts)
    check = selected.check
    page = page_template("selection.html.j2").render(
        title=title or f"A subset of {task.name}",
        lead=kept_words(selected),
        verdict=cost_words(selected),
        description=task.description,
        check=None if check is None else check_grid(check),
        check_lead="" if check is None else _check_lead(check),
        check_verdict=[] if check is None else check_verdict(check),
        check_note="" if check is None else _check_note(check),
        wrong=wrong_words(selected),
        notes=selection.report.notes,
        chips=chips,
        figures=figures,
        meanings=meanings(selection.report),
        classes=_classes(selected),
        examples=examples(selected),
        scores_lead=_scores_lead(selected),
        settings=_settings(selected),
        environment=environment_grid([selected.environment]),
        version=package_version("steepest"),
        css=page_sheet(charts.paint, "selection.css"),
    )
    return page + "\n"


def write_selection_page(selected: Selected, path: Path, *, title: str | None = None) -> Path:
    """Write the page, so that the file is either complete or as it was.

    Args:
        selected: The selection and all that is told about it.
        path: Where to.
        title: Heading of the page; None makes one.

    Returns:
        The path.
    """
    write_atomically(path, render_selection(selected, title=title))
    return path


def _check_lead(check: Check) -> str:
    seeds = count(len({run.seed for run in check.runs}), "seed")
    return (
        f"Fresh models, {seeds} each, trained with {check.optimizer} for {count(check.steps, 'step')}, whatever they "
        "are trained on. The random subset is another draw for every seed."
    )


def _check_note(check: Check) -> str:
    return (
        "Mean ± standard deviation over the seeds. All take equal steps, so all train for about as long, and the "
        f"selection comes on top ({number(check.cost)} s with its scorer). The steps of one pass over everything are "
        f"those of {number(check.num_samples / check.kept)} passes over a subset."
    )


def _classes(selected: Selected) -> Grid | None:
    counts = selected.selection.report.class_counts
    if not counts or len(counts) > _MOST_CLASSES:
        return None
    names = selected.task.classes
    rows = [
        (
            Entry(names[label] if 0 <= label < len(names) else str(label)),
            Entry(f"{of:,}"),
            Entry(f"{kept:,}"),
            Entry(f"{100 * kept / of:.1f} %" if of else "-"),
        )
        for label, (kept, of) in sorted(counts.items())
    ]
    return Grid(("class", "samples", "kept", "share"), tuple(rows), name="Classes")


def _scores_lead(selected: Selected) -> str:
    known = " A label that is known to be wrong is marked so." if wrong_words(selected) else ""
    return f"Samples of the training split by their score, kept or not.{known}"


def _shared(report: SelectionReport) -> str:
    if report.processes == 1:
        return ""
    return f"{report.processes} processes; the first of them gave {memory(report.traffic)} to the others and to sums"


def _settings(selected: Selected) -> list[tuple[str, str]]:
    selection, report = selected.selection, selected.selection.report
    options = {name.replace("_", " ").capitalize(): option_text(value) for name, value in selection.options.items()}
    weights = selection.weights
    found = {
        "Method": selection.method,
        **options,
        "Gradients of": selected.scorer.words,
        "Passes with the model": str(report.passes),
        "Shared by": _shared(report),
        "Seconds of the passes": number(report.seconds),
        "Seconds of the look at the subset": number(report.review_seconds) if report.review_seconds else "",
        "Weights of the samples": "all 1"
        if bool((weights == 1).all())
        else f"{number(weights.min().item())} to {number(weights.max().item())}",
        "Data": f"sha256 {selection.fingerprint[:16]}" if selection.fingerprint else "",
        "Model": f"sha256 {selection.model_hash[:16]}" if selection.model_hash else "",
    }
    return [(name, value) for name, value in found.items() if value]
