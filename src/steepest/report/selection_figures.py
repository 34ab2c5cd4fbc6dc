"""Figures of a selection: what it did to the classes or the targets, and where in the scores it took its samples."""

from typing import Any

import torch
from torch import Tensor

from steepest.report.charts import Charts, Figure
from steepest.report.palette import Look
from steepest.report.selection_words import Selected, percent
from steepest.report.style import PagePaint
from steepest.report.view import Chip
from steepest.report.words import short

__all__ = ["ALL", "KEPT", "selection_figures", "selection_legend"]

# Okabe and Ito's blue, and a grey: apart for readers with any colour vision, and by their lightness.
KEPT, ALL = Look("#0072B2"), Look("#8a8a8a")
_MOST_BARS, _MOST_NAMES, _LONGEST_NAME, _BINS = 40, 12, 6, 40


def selection_legend(charts: Charts) -> tuple[Chip, ...]:
    """What the two colours stand for.

    Args:
        charts: Draws the figures of the page.

    Returns:
        The legend.
    """
    return (Chip("kept", charts.paint.place(KEPT), ""), Chip("all training samples", charts.paint.place(ALL), ""))


def selection_figures(selected: Selected, charts: Charts) -> list[Figure]:
    """Draw what there is to draw.

    Args:
        selected: The selection.
        charts: Draws the figures of the page.

    Returns:
        Classes or targets, and scores; none of them where the data or the method have none.
    """
    selection = selected.selection
    figures = []
    counts = selection.report.class_counts
    if counts:
        names = [_name(selected.task.classes, label) for label in counts]
        figures.append(_classes(names, list(counts.values()), charts))
    elif selected.splits.train.targets.is_floating_point():
        targets = selected.splits.train.targets.flatten(start_dim=1)[:, 0].cpu()
        figures.append(_spread("Targets", "target", targets, selection.indices, charts))
    if selection.scores is not None and bool(selection.scores.isfinite().any()):
        figures.append(_spread("Scores", "score", selection.scores, selection.indices, charts))
    return figures


def _name(classes: tuple[str, ...], label: int) -> str:
    return classes[label] if 0 <= label < len(classes) else str(label)


def _classes(names: list[str], counts: list[tuple[int, int]], charts: Charts) -> Figure:
    kept, of = sum(pair[0] for pair in counts), sum(pair[1] for pair in counts)
    shares = [(100 * one / max(1, kept), 100 * all_ / max(1, of)) for one, all_ in counts]
    paint = charts.paint

    def draw(_figure: Any, axes: Any) -> None:
        places = torch.arange(len(names)).tolist()
        if len(names) > _MOST_BARS:
            _steps(axes, places, shares, paint)
        else:
            axes.bar([place - 0.2 for place in places], [pair[1] for pair in shares], 0.38, color=paint.line(ALL))
            axes.bar([place + 0.2 for place in places], [pair[0] for pair in shares], 0.38, color=paint.line(KEPT))
        _name_places(axes, names)
        _frame(axes)

    said = ", ".join(
        f"{name} {percent(one / 100)} of {percent(all_ / 100)}" for name, (one, all_) in zip(names, shares, strict=True)
    )
    label = (
        f"Share of each class in the subset, and in all samples: {said if len(names) <= _MOST_NAMES else len(names)}."
    )
    return Figure("Classes: % of the kept samples and of all", charts.figure(draw, label))


def _steps(axes: Any, places: list[int], shares: list[tuple[float, float]], paint: PagePaint) -> None:
    """Bars of a hundred classes would be thinner than their gaps."""
    axes.fill_between(places, [pair[1] for pair in shares], step="mid", color=paint.line(ALL), linewidth=0)
    axes.step(places, [pair[0] for pair in shares], where="mid", color=paint.line(KEPT), linewidth=1.4)


def _name_places(axes: Any, names: list[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    if len(names) <= _MOST_NAMES:
        fits = max(map(len, names)) <= _LONGEST_NAME
        axes.set_xticks(range(len(names)), names if fits else [str(place) for place in range(len(names))])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel("class")
    axes.tick_params(axis="x", length=0)


def _spread(caption: str, what: str, values: Tensor, kept: Tensor, charts: Charts) -> Figure:
    """How a number is spread over all samples, and over the kept ones, in the same bins."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    there = values.isfinite()
    low, high = values[there].min().item(), values[there].max().item()
    room = (high - low) or abs(high) or 1.0
    edges = torch.linspace(low, low + room, _BINS + 1, dtype=torch.float64)
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[kept] = True
    heights = [_histogram(values[there & chosen], edges) for chosen in (torch.ones_like(mask), mask)]
    paint = charts.paint

    def draw(_figure: Any, axes: Any) -> None:
        for height, look in zip(heights, (ALL, KEPT), strict=True):
            axes.bar(edges[:-1].tolist(), height, room / _BINS, align="edge", color=paint.line(look), linewidth=0)
        axes.set_xlabel(what)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: short(value)))
        _frame(axes)

    label = f"{caption} of all samples{_range(values[there])}, and of the kept ones{_range(values[there & mask])}."
    return Figure(f"{caption}: number of all samples and of the kept ones", charts.figure(draw, label))


def _range(values: Tensor) -> str:
    if not len(values):
        return ""
    low, high = (short(float(f"{value.item():.4g}")) for value in values.aminmax())
    return f", from {low} to {high}"


def _histogram(values: Tensor, edges: Tensor) -> list[float]:
    places = torch.bucketize(values.double(), edges[1:-1], right=True)
    return places.bincount(minlength=len(edges) - 1).double().tolist()


def _frame(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_axisbelow(True)
    axes.grid(visible=True, axis="y", which="major")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: short(value)))
