"""Samples at both ends of the scores: pictures of images, rows of numbers of everything else."""

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.report.grids import Entry, Grid
from steepest.report.selection_words import Selected, score_words
from steepest.report.words import short

__all__ = ["Example", "Examples", "examples"]

_SHOWN, _COLUMNS = 10, 6
# Pixels of a side that are shown; more would make the page heavy and not clearer.
_LARGEST = 96
# Inputs without names and shape that are a square of at least this side are shown as one.
_SMALLEST_SQUARE = 8


@dataclass(frozen=True)
class Example:
    """One picture.

    Attributes:
        source: The picture as a data URI.
        label: Its class.
        score: Its score.
        position: Where it is in the training split.
        kept: Whether it is in the subset.
        wrong: Whether its label is known to be wrong.
    """

    source: str
    label: str
    score: str
    position: int
    kept: bool
    wrong: bool


@dataclass(frozen=True)
class Examples:
    """One end of the scores: pictures or a table."""

    title: str
    pictures: tuple[Example, ...]
    rows: Grid | None


def examples(selected: Selected) -> list[Examples]:
    """The highest and the lowest scores.

    Args:
        selected: The selection.

    Returns:
        Both ends; nothing where the method has no scores.
    """
    scores = selected.selection.scores
    if scores is None or not bool(scores.isfinite().any()):
        return []
    order = scores.nan_to_num(nan=-math.inf).argsort(descending=True, stable=True)
    order = order[scores[order].isfinite()]
    shown = min(_SHOWN, max(1, len(order) // 2))
    ends = (("Highest scores", order[:shown]), ("Lowest scores", order[-shown:].flip(0)))
    return [_end(selected, title, positions) for title, positions in ends]


def _end(selected: Selected, title: str, positions: Tensor) -> Examples:
    shape = _picture_shape(selected)
    if shape is None:
        return Examples(title, (), _rows(selected, title, positions))
    pixels = _pixels(selected, positions).reshape(len(positions), *shape)
    kept = set(selected.selection.indices.tolist())
    pictures = tuple(
        Example(
            source=_png(image),
            label=_label(selected, position),
            score=_score(selected, position),
            position=position,
            kept=position in kept,
            wrong=_is_wrong(selected, position),
        )
        for position, image in zip(positions.tolist(), pixels, strict=True)
    )
    return Examples(title, pictures, None)


def _picture_shape(selected: Selected) -> tuple[int, int, int] | None:
    """Channels, height and width; None where the inputs are no images."""
    shape = selected.splits.train.inputs.shape[1:]
    if len(shape) == 3 and shape[0] in {1, 3} and min(shape[1:]) > 1:
        return shape[0], shape[1], shape[2]
    side = math.isqrt(math.prod(shape))
    unnamed = len(shape) == 1 and not selected.task.features and selected.task.kind == "classification"
    if unnamed and side >= _SMALLEST_SQUARE and side * side == shape[0]:
        return 1, side, side
    return None


def _pixels(selected: Selected, positions: Tensor) -> Tensor:
    """Inputs as they were before they were standardised, from 0 to 1."""
    inputs, scaling = selected.splits.train.inputs, selected.splits.scaling
    chosen = inputs[positions.to(inputs.device)].cpu().float()
    if "input_mean" in scaling:
        chosen = chosen * scaling["input_scale"].cpu() + scaling["input_mean"].cpu()
    low, high = chosen.min().item(), chosen.max().item()
    if low > -0.01 and high < 255.5:  # rounding of the scaling
        return (chosen / (255.0 if high > 1.01 else 1.0)).clamp(0, 1)
    return (chosen - low) / max(high - low, 1e-12)


def _png(image: Tensor) -> str:
    from matplotlib.image import imsave

    side = max(image.shape[1:])
    if side > _LARGEST:
        size = [max(1, round(length * _LARGEST / side)) for length in image.shape[1:]]
        image = torch.nn.functional.interpolate(image.unsqueeze(0), size=size, mode="area")[0]
    plane = image.movedim(0, -1) if image.shape[0] == 3 else image[0].unsqueeze(-1).expand(-1, -1, 3)
    content = io.BytesIO()
    # Without the version of matplotlib in it, the same selection gives the same page.
    bare: dict[str, Any] = {"Software": None}
    imsave(content, plane.contiguous().numpy(), format="png", metadata=bare)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _rows(selected: Selected, title: str, positions: Tensor) -> Grid:
    inputs = selected.splits.train.inputs.flatten(start_dim=1)
    shown = min(_COLUMNS, inputs.shape[1])
    names = selected.task.features[:shown] or tuple(f"input {place + 1}" for place in range(shown))
    kept = set(selected.selection.indices.tolist())
    rows = []
    for position in positions.tolist():
        values = [Entry(short(float(f"{value:.3g}"))) for value in inputs[position, :shown].tolist()]
        wrong = " (wrong label)" if _is_wrong(selected, position) else ""
        rows.append((
            Entry(f"{position:,}"),
            Entry(_score(selected, position)),
            Entry("yes" if position in kept else "no"),
            Entry(_label(selected, position) + wrong),
            *values,
        ))
    return Grid(("sample", "score", "kept", "target", *names), tuple(rows), frozenset({0, 2}), title)


def _label(selected: Selected, position: int) -> str:
    target = selected.splits.train.targets[position]
    if target.is_floating_point():
        return ", ".join(short(float(f"{value:.3g}")) for value in target.flatten()[:3].tolist())
    classes, label = selected.task.classes, int(target)
    return classes[label] if 0 <= label < len(classes) else str(label)


def _score(selected: Selected, position: int) -> str:
    scores = selected.selection.scores
    return "-" if scores is None else score_words(scores[position].item())


def _is_wrong(selected: Selected, position: int) -> bool:
    return selected.wrong is not None and bool(selected.wrong[position])
