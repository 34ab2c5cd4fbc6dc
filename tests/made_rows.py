"""Batches for methods that keep a row for every sample: from a model, or from numbers that a test chose."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.engine import Capture, Jacobian
from steepest.selection.method import Method, Picked, Rows, Run

__all__ = ["chosen", "feed", "from_model", "from_numbers", "restarted"]


class GivenJacobian(Jacobian):
    """Of a layer with these inputs (no 1 joined) and output gradients."""

    def __init__(self, inputs: Tensor, errors: Tensor) -> None:
        shape = torch.Size([errors.shape[-1], inputs.shape[-1]])
        super().__init__([], {"w": shape}, len(inputs), 1 << 30, inputs.device, inputs.dtype)
        self._inputs, self._errors = inputs, errors

    def layer_rows(self, weight: str) -> tuple[Tensor, Tensor]:
        assert weight == "w"
        inputs, errors = (m.unsqueeze(1) if m.ndim == 2 else m for m in (self._inputs, self._errors))
        return inputs, errors


def from_numbers(
    features: Tensor, errors: Tensor | None = None, labels: Tensor | None = None, size: int = 7
) -> Iterator[Rows]:
    """Batches of ``size`` samples whose last layer saw these features."""
    errors = features.new_ones(len(features), 1) if errors is None else errors
    for index in torch.arange(len(features)).split(size):
        jacobian = GivenJacobian(features[index], errors[index])
        batch_labels = None if labels is None else labels[index]
        yield Rows(index, batch_labels, torch.zeros(len(index)), jacobian, "w")


def from_model(model: nn.Module, inputs: Tensor, targets: Tensor, last: str, size: int = 7) -> Iterator[Rows]:
    """Batches of a model's cross-entropy, per sample the mean over positions."""
    capture = Capture(model)
    for index in torch.arange(len(inputs)).split(size):
        with capture:
            losses = (
                F.cross_entropy(model(inputs[index]), targets[index], reduction="none").view(len(index), -1).mean(1)
            )
        yield Rows(index, targets[index], losses.detach(), capture.jacobian(losses), last)


def feed(run: Run, batches: Iterator[Rows], *, after: int = -1, until: int | None = None) -> Run:
    """Let a run see the batches after number ``after`` and before number ``until``."""
    for number, rows in enumerate(batches):
        if number > after and (until is None or number < until):
            run.update(0, rows)
    return run


def chosen(
    method: Method, features: Tensor, count: int, errors: Tensor | None = None, labels: Tensor | None = None
) -> Picked:
    """What a method keeps of samples with these features."""
    return feed(method.begin(), from_numbers(features, errors, labels)).pick(count, labels)


def restarted(method: Method, run: Run, path: str) -> Run:
    """A new run with the old one's state, through a file."""
    torch.save(run.state_dict(), path)
    again = method.begin()
    again.load_state_dict(torch.load(path, weights_only=True))
    return again
