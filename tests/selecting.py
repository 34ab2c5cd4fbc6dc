"""A small selection method of our own, and data and a model to try the driver of selections with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from made_checkpoints import manifest_of, tensors_of
from steepest.distributed.checkpoint.folders import complete_folders
from steepest.distributed.checkpoint.tree import unpack
from steepest.selection import Method, Picked, Rows, Run
from steepest.selection.method import Scope

__all__ = ["CROSS_ENTROPY", "Toy", "ToyRun", "kept_in", "net", "points"]

CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")


@dataclass(frozen=True)
class Toy(Method):
    """Scores samples by how their gradients agree with a random sum of all; keeps evenly spaced ranks of the scores."""

    name: ClassVar[str] = "toy"
    scope: Scope = "last"
    passes: int = 2
    reference: bool = False

    def begin(self) -> Run:
        return ToyRun(self)


class ToyRun(Run):
    nbytes = 1234

    def __init__(self, method: Toy) -> None:
        self.passes, self._reference = method.passes, method.reference
        self.total: dict[str, Tensor] = {}
        self.scores: list[Tensor] = []
        self.ended: list[int] = []
        self.seen: list[tuple[int, int]] = []

    def reads(self, number: int) -> Literal["data", "reference"]:
        return "reference" if self._reference and number == 0 else "data"

    def update(self, number: int, rows: Rows) -> None:
        self.seen.append((number, int(rows.indices[0])))
        if number < self.passes - 1 or self.passes == 1:  # float32 sums: another order gives other numbers
            part = rows.jacobian.vjp(torch.rand(len(rows.indices), generator=torch.Generator().manual_seed(number)))
            self.total = {name: self.total.get(name, 0) + value for name, value in part.items()}
        if number == self.passes - 1:
            self.scores.append(rows.jacobian.jvp(self.total))

    def end_pass(self, number: int) -> None:
        self.ended.append(number)

    def pick(self, count: int, labels: Tensor | None) -> Picked:
        del labels
        scores = torch.cat(self.scores)
        ranks = (torch.arange(count) * len(scores)) // count
        indices = scores.argsort(descending=True, stable=True)[ranks].sort().values
        return Picked(indices, scores, torch.ones(count), ("a note of the method.",), {"certificate": 0.5})

    def state_dict(self) -> dict[str, Any]:
        return {"total": dict(self.total), "scores": list(self.scores), "ended": list(self.ended)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total, self.scores, self.ended = dict(state["total"]), list(state["scores"]), list(state["ended"])


def kept_in(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint of a selection holds: what all processes know, and the part of each."""
    newest = complete_folders(folder)[-1]
    found: dict[str, Any] = unpack(manifest_of(newest)["state"], tensors_of(newest))
    return found


def points(number: int = 50, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(number, 4, generator=generator), torch.arange(number) % classes


def net(outputs: int = 3) -> nn.Module:
    """A small network with the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, outputs))
