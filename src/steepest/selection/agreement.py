"""A selection by SAGE under way: sketch the gradients, find the consensus, score every sample against it."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from steepest.errors import InvalidOptionError, SelectionError
from steepest.linalg import FrequentDirections
from steepest.selection.consensus import ClassMeans, by_group, direction, unit_rows
from steepest.selection.joining import add_counts, add_sums, from_first, merge_sketches
from steepest.selection.merging import OWN, merged, with_rows, without_rows
from steepest.selection.method import Picked, Rows, Run
from steepest.selection.quotas import ALL, class_weights, settled
from steepest.selection.rules import keep_by_group
from steepest.selection.together import Together

if TYPE_CHECKING:  # the options know how to begin a run
    from steepest.selection.sage import SAGE

__all__ = ["SageRun"]

ROUNDING = torch.finfo(torch.float32).eps ** 2  # of a squared norm: rows that are nothing else have no rank
# Projecting a batch over sketching it: 0.07 to 0.17 on MLPs and CNNs, last layer and all layers.
PROJECTING = 0.1
# Tensors and plain values, saved as they are.
PLAIN = ("sketch", "sums", "counts", "consensus", "by_class", "sizes", "zeros", "scores", "projections", "numbers")


class SageRun(Run):
    """One selection by SAGE under way.

    Args:
        method: The options.
    """

    merges = True

    def __init__(self, method: "SAGE") -> None:
        self._method = method
        steps = ("sketch", "score") if method.consensus == "gradients" else ("sketch", "mean", "score")
        self._steps = steps[:2] if method.keep_projections else steps
        self.passes = len(self._steps)
        self._fd: FrequentDirections | None = FrequentDirections(method.sketch_size, robust=method.robust)
        self._means = ClassMeans()
        self._shapes: dict[str, torch.Size] = {}
        self._sketch: dict[str, Tensor] = {}  # [l, *shape]
        self._sums: dict[int, Tensor] = {}  # of unit projections, [l]
        self._counts: dict[int, int] = {}  # of what is in the sums, which may come from the reference set
        self._consensus: dict[int, Tensor] = {}  # [l]
        self._by_class: bool | None = None  # not known before the first batch
        self._sizes: dict[int, int] = {}  # of the groups of the data
        self._zeros = 0
        self._scores = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._projections = torch.zeros(0, 0, dtype=torch.float16, device="cpu")
        self._numbers: dict[str, float] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that the run holds now: the sketch, the sums of the classes seen so far, scores and projections."""
        held = [*self._sketch.values(), self._scores, self._projections]
        return (self._fd.nbytes if self._fd else 0) + self._means.nbytes + sum(part.nbytes for part in held)

    def reads(self, number: int) -> Literal["data", "reference"]:
        """The reference set between the sketch and the scores, if there is one; else the data."""
        return "reference" if number == 1 and self._method.consensus == "reference" else "data"

    def effort(self, number: int) -> float:
        """The sketch is what costs."""
        return 1.0 if self._steps[number] == "sketch" else PROJECTING

    def update(self, number: int, rows: Rows) -> None:
        """Take the next batch of a pass."""
        source, step = self.reads(number), self._steps[number]
        groups = self._groups(rows, source)
        if self._fd is not None and step == "sketch":
            self._shapes = rows.jacobian.shapes
            if self._method.consensus == "gradients":
                self._means.sketch_and_add(rows, groups, self._fd)
            else:
                rows.jacobian.sketch_into(self._fd)
            for group, places in by_group(groups):
                self._sizes[group] = self._sizes.get(group, 0) + len(places)
            return
        if source == "data":
            self._check_seen(rows, groups)
        self._sketch = {name: part.to(rows.jacobian.device) for name, part in self._sketch.items()}
        units = unit_rows(rows.jacobian, self._sketch, rows.indices)
        if number == self.passes - 1:
            self._zeros += int((units == 0).all(1).sum())
        if step == "score":
            self._scores[rows.indices] = self._agreement(units, groups)
            return
        for group, places in by_group(groups):
            self._sums[group] = self._sums.get(group, 0) + units[places].sum(0)
            self._counts[group] = self._counts.get(group, 0) + len(places)
        if self._method.keep_projections:
            self._projections[rows.indices] = units.half()

    def end_pass(self, number: int) -> None:
        """Turn what a pass added up into the sketch, or into the consensus."""
        step = self._steps[number]
        if step == "sketch" and self._fd is not None:
            self._settle_sketch(self._fd)
            self._fd, self._means = None, ClassMeans()  # the buffer is twice the sketch
        elif step == "mean":
            lacking = sorted(self._sizes.keys() - self._sums.keys())
            if lacking:
                raise SelectionError(
                    f"the reference set has no sample of class {', '.join(map(str, lacking))}, which the data has: add "
                    "some, or score against one consensus with class_policy='global'."
                )
            self._consensus = {g: direction(total, self._counts[g]) for g, total in self._sums.items()}

    def join(self, number: int, together: Together) -> None:
        """Conclude a pass that several processes shared: the first one decides, and all know the same afterwards."""
        step = self._steps[number]
        self._by_class, self._shapes = together.one((self._by_class, self._shapes))  # the first always has samples
        if step == "sketch" and self._fd is not None:
            self._sizes = add_counts(self._sizes, together)
            merge_sketches(self._fd, together)
            if self._method.consensus == "gradients":
                self._means.join(together)
        elif step == "mean":
            self._counts = add_counts(self._counts, together)
            sums = add_sums({g: {"": total} for g, total in self._sums.items()}, together)
            self._sums = {g: parts[""] for g, parts in sums.items()}
        with together.attempt():
            if together.leads:
                self.end_pass(number)
        if step == "score":
            own = self._scores[together.positions[together.ranks.rank]]
            self._scores = together.in_order(own)
        else:
            self._follow(together, step)
        if number == self.passes - 1:
            self._zeros = sum(together.told(self._zeros))
            if self._method.keep_projections:
                self._projections = together.in_order(self._projections[together.positions[together.ranks.rank]])

    def _follow(self, together: Together, step: str) -> None:
        """Take the consensus, and after the first pass the sketch, that the first process made."""
        self._consensus = from_first(self._consensus, together)
        if step != "sketch":
            return
        self._sketch = from_first(self._sketch, together)
        self._numbers = together.one(self._numbers)
        self._fd, self._means = None, ClassMeans()
        total, length = sum(self._sizes.values()), len(next(iter(self._sketch.values())))
        self._make_room(total, length)

    def _make_room(self, total: int, length: int) -> None:
        """For a score, and if need be a projection, of every sample."""
        self._scores = torch.full((total,), torch.nan, dtype=torch.float32, device="cpu")
        if self._method.keep_projections:
            self._projections = torch.zeros(total, length, dtype=torch.float16, device="cpu")

    def _settle_sketch(self, fd: FrequentDirections) -> None:
        """Take the finished sketch, what it certifies, and the consensus of true gradients."""
        fd.compress()
        flat = fd.sketch()
        if not isinstance(flat, dict):
            raise TypeError("the sketch was not fed by parameter")
        total = sum(self._sizes.values())
        norms = torch.stack([part.double().square().sum(1).cpu() for part in flat.values()]).sum(0)
        self._numbers = {
            "certificate": fd.certificate,
            "certificate_relative": fd.certificate / fd.squared_norm if fd.squared_norm else 0.0,
            "squared_norm": fd.squared_norm,
            "sketch_rank": float((norms > ROUNDING * len(norms) * norms.amax()).sum()) if len(norms) else 0.0,
        }
        if self._method.robust:
            self._numbers["ridge"] = fd.ridge
        largest = float(norms.max().sqrt()) if len(norms) else 0.0
        if self._method.consensus == "gradients":
            self._consensus = {g: direction(z, largest) for g, z in self._means.projected(flat).items()}
        # Only directions of S g matter. A power of two rounds nothing, and float32 then holds S g wherever it holds g.
        scale = 2.0 ** max(-126, min(126, -math.frexp(largest)[1]))
        self._sketch = {name: part.mul_(scale).view(len(part), *self._shapes[name]) for name, part in flat.items()}
        self._make_room(total, len(norms))

    def _agreement(self, units: Tensor, groups: Tensor) -> Tensor:
        """Scores of unit projections, each against the consensus of its group."""
        scores = units.new_zeros(len(units))
        for group, places in by_group(groups):
            scores[places] = units[places] @ self._consensus[group]
        return scores.float()

    def _groups(self, rows: Rows, source: str) -> Tensor:
        """The group of every sample; what labels are missing for is refused in the first batch."""
        method, labels = self._method, rows.labels
        if source == "data" and labels is None and method.weights == "class":
            raise InvalidOptionError(
                "weights='class' needs the class of every sample, and the data has no whole-number labels: give "
                "labels=, one whole number per sample, or weights='uniform'."
            )
        by_class = settled(method.class_policy, labels) != "global"
        self._by_class = by_class if self._by_class is None else self._by_class
        if self._by_class and labels is not None:
            return labels
        if self._by_class or (by_class and source == "data"):
            where = "the data" if source == "data" else "the data and the reference set"
            raise SelectionError(
                f"some batches of {where} have labels and others have none, so that classes cannot be compared: give "
                "every sample a label, or class_policy='global'."
            )
        return torch.full((len(rows.indices),), ALL, device="cpu")

    def _check_seen(self, rows: Rows, groups: Tensor) -> None:
        """Refuse a sample or a class that the first pass did not meet."""
        total = sum(self._sizes.values())
        strangers = sorted(set(groups.tolist()) - self._sizes.keys())
        if strangers or int(rows.indices.max()) >= total:
            what = f"class {strangers[0]}" if strangers else f"sample {int(rows.indices.max())}"
            raise SelectionError(
                f"the data changed between passes: {what} was not there in the first. Give data whose samples, labels "
                "and order stay the same."
            )

    def pick(self, count: int, labels: Tensor | None) -> Picked:
        """Score, and choose in every class as the rule says."""
        method = self._method
        scores = self._scores
        if method.keep_projections:
            one = torch.full((len(scores),), ALL, device="cpu")
            groups = labels if self._by_class and labels is not None else one
            parts = zip(self._projections.split(4096), groups.split(4096), strict=True)
            scores = torch.cat([self._agreement(units.double(), members) for units, members in parts])
        missing = int(scores.isnan().sum())
        if missing or not len(scores):
            raise SelectionError(
                f"{missing} of {len(scores)} samples have no score: give every pass the whole data before the choice."
            )
        indices = keep_by_group(scores, labels, count, method.class_policy, method.rule)
        weights = torch.ones(count, dtype=torch.float32, device="cpu")
        if method.weights == "class" and labels is not None:
            weights = class_weights(indices, labels)
        means = {"mean_agreement": scores.double().mean(), "mean_agreement_kept": scores[indices].double().mean()}
        numbers = self._numbers | {name: float(mean) for name, mean in means.items()}
        return Picked(indices, scores, weights, tuple(self._notes()), numbers)

    def _notes(self) -> Iterator[str]:
        """What a user should know about the scores."""
        if self._zeros:
            yield f"The gradients of {self._zeros} samples are zero in the sketch: they agree with nothing and score 0."
        cancelled = [str(g) for g, u in sorted(self._consensus.items()) if not bool(u.any())]
        if cancelled and not self._by_class:
            yield "The unit gradients cancel: there is no consensus, and every sample scores 0."
        elif cancelled:
            yield f"The unit gradients of class {', '.join(cancelled)} cancel: their samples score 0."

    def state_dict(self) -> dict[str, Any]:
        """Copy everything learnt so far."""
        return {
            "fd": None if self._fd is None else self._fd.state_dict(),
            "means": self._means.state_dict(),
            "shapes": {name: list(shape) for name, shape in self._shapes.items()},
            **{name: copy.deepcopy(getattr(self, f"_{name}")) for name in PLAIN},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state, which stays as it is."""
        if state["fd"] is None:
            self._fd = None
        else:
            self._fd = FrequentDirections(self._method.sketch_size, robust=self._method.robust)
            self._fd.load_state_dict(state["fd"])
        self._means = ClassMeans()
        self._means.load_state_dict(state["means"])
        self._shapes = {name: torch.Size(shape) for name, shape in state["shapes"].items()}
        for name in PLAIN:
            setattr(self, f"_{name}", copy.deepcopy(state[name]))

    def divided(self, number: int, positions: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take the state apart: what this process sketched, added up or scored, and all else."""
        state = self.state_dict()
        own = {name: state.pop(name) for name in OWN[self._steps[number]]}
        return state, without_rows(own, positions)

    def resume(
        self, number: int, common: Mapping[str, Any], shares: Sequence[tuple[Mapping[str, Any], Tensor]]
    ) -> None:
        """Go on with the sketches of some processes merged, their sums added, and their scores by sample."""
        fresh = SageRun(self._method)
        if common.get("sketch"):
            fresh._make_room(sum(common["sizes"].values()), len(next(iter(common["sketch"].values()))))
        blank = fresh.state_dict()
        own = merged(self._method, {name: blank[name] for name in OWN[self._steps[number]]}, [s for s, _ in shares])
        self.load_state_dict({**common, **with_rows(own, blank, shares)})
