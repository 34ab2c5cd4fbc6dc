"""One step of KFAC, of one process or of several: what it is made from, what it will do, and then doing it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.errors import CaptureError, InvalidOptionError, NonFiniteError
from steepest.linalg.kronecker import KroneckerSolver
from steepest.optim._apply import adamw_step, check_magnitude, descend
from steepest.optim.blocks import Block
from steepest.optim.combining import Local, Sums, combine, counts
from steepest.optim.crew import Crew
from steepest.optim.curvature import Curvature, Gathered
from steepest.optim.gathering import Gathering, Recipe
from steepest.optim.layers import LayerOptimizer
from steepest.optim.loss_scale import captured_scale, loss_scale
from steepest.optim.periods import Period, at_step, check_group
from steepest.optim.plan import Draft, Planned, clip_factor, read, total, total_norm
from steepest.optim.shards import Found, Shards

__all__ = ["KFACDiagnostics", "KroneckerStep"]


@dataclass(frozen=True)
class KFACDiagnostics:
    """What the last step did.

    Args:
        update_norm: Euclidean norm of the preconditioned gradient, before momentum and lr.
        clip: Factor of kl_clip, 1 where nothing was clipped.
        num_decompositions: Layers whose factors were decomposed in this step.
        num_failures: Decompositions that failed and left the last good one in use, all layers and the current row
            of failures.
        num_skipped: Non-finite steps skipped so far.
    """

    update_norm: float
    clip: float
    num_decompositions: int
    num_failures: int
    num_skipped: int


class KroneckerStep(LayerOptimizer):
    """What `steepest.KFAC` does in a step; it lives on the attributes that its subclass sets."""

    diagnostics: KFACDiagnostics | None
    _recipe: Recipe
    _solver: KroneckerSolver
    _crew: Crew
    _shards: Shards
    _gathering: Gathering | None
    _grad_scaler: Any
    _schedules: dict[str, Any]
    _factor_update_steps: Period
    _inverse_update_steps: Period

    @property
    def _memory(self) -> dict[str, Any]:
        """State of the optimizer as a whole; kept with the first parameter, as in torch.optim.LBFGS."""
        state: dict[str, Any] = self.state[next(p for group in self.param_groups for p in group["params"])]
        if "steps" not in state:
            state.update(steps=0, num_skipped=0)
        return state

    def _curvature(self, block: Block) -> Curvature | None:
        return Curvature.from_state(self.state[block.weight], self._solver)

    def _gathered(self) -> Gathering:
        if self._gathering is None:
            raise RuntimeError("the optimizer is not constructed yet")
        return self._gathering

    def _take_step(self) -> None:
        local = Local(None)
        if self._crew.trouble is None:
            with self._crew.guarded():
                local = self._looked_at()
        sums = self._sums(local)
        if sums is None or local.scale is None:
            return  # the GradScaler found infinity: it skips the step, as with every optimizer
        drafts = [
            self._draft(block, group, sums, local) for group in self._layer_groups() for block in self._blocks_of(group)
        ]
        drafts = self._shards.decompose(drafts)
        found = self._shards.directions(drafts, lambda draft: self._direction(draft, sums), self._num_found)
        plan: list[tuple[dict[str, Any], list[Planned]]] = [(group, []) for group in self._layer_groups()]
        for draft, (direction, numbers) in zip(drafts, found, strict=True):
            fresh = draft.is_stale and draft.curvature.age == 0
            layer = Planned(draft.block, draft.curvature, draft.gradient, direction, fresh, numbers)
            next(mine for group, mine in plan if group is draft.group).append(layer)
        self._finish(plan, local.scale)

    def _looked_at(self) -> Local:
        """Check what this process brings to the step, before anything is exchanged."""
        if self._gathered().is_closed:
            raise CaptureError("The optimizer was closed and no longer watches the model: make a new one to go on.")
        steps, gathering, together = self._memory["steps"], self._gathered(), self._crew.ranks is not None
        self._schedule(steps)
        every = at_step("factor_update_steps", self._factor_update_steps, steps)
        period = -(-at_step("inverse_update_steps", self._inverse_update_steps, steps) // every)
        scale = loss_scale(self)
        if scale is None:
            return Local(None, period=period)
        size = self._size()
        if not together and not math.isfinite(size):
            raise NonFiniteError(
                "A gradient holds NaN or infinity; parameters and optimizer state are unchanged. Remedy: lower lr, "
                "raise damping, clip with kl_clip, or skip such steps with on_nonfinite='skip'."
            )
        captured, grad_scale = 1.0, 1.0
        if together or gathering.parts:
            captured = captured_scale(self, self._grad_scaler, scale)
        if gathering.terms:
            grad_scale = self._recipe.grad_scale(gathering.terms, captured)
        return Local(scale, captured, grad_scale, size, period)

    def _sums(self, local: Local) -> Sums | None:
        """What the step is made from, of this process or of all; None where a GradScaler skips it."""
        crew, gathering, trained = self._crew, self._gathered(), self._trained()
        missing = self._missing()
        if crew.ranks is None:
            if local.scale is None:
                return None
            reached = [name for name, block in self._blocks.items() if block.weight.grad is not None]
            self._check_counts(self._more_counts(), reached)
            return Sums(gathering.parts, local.grad_scale, frozenset(missing), self._extras(reached))
        own = self._own_counts(local, missing)
        totals = crew.tally(own, {"step": self._memory["steps"], "period": local.period}, local.size, trained)
        if totals["skipped"][0]:
            return None
        having = {id(p) for p, count in zip(trained, totals["grads"], strict=True) if count}
        reached = [name for name, block in self._blocks.items() if id(block.weight) in having]
        self._check_counts(totals, reached)
        return combine(crew, self._blocks, trained, gathering, local, totals, self._extras(reached))

    def _own_counts(self, local: Local, missing: Sequence[str]) -> dict[str, list[float]]:
        return {**counts(self._blocks, self._trained(), self._gathered(), local, missing), **self._more_counts()}

    def _missing(self) -> list[str]:
        """Layers of which this process should have a decomposition and has none."""
        states = {name: self.state.get(b.weight, {}) for name, b in self._blocks.items() if self._shards.keeps(b)}
        return [name for name, state in states.items() if "input_factor" in state and not state["decomposition"]]

    def _more_counts(self) -> dict[str, list[float]]:
        """Numbers that the ranks add up, beside those of `counts`."""
        return {}

    def _check_counts(self, totals: Mapping[str, Sequence[float]], reached: Sequence[str]) -> None:
        """Refuse what the sums of all ranks' counts show; called on all of them alike."""

    def _extras(self, reached: Sequence[str]) -> dict[str, Tensor | None]:
        """A matrix for every layer that has a gradient, to be averaged over the ranks; None for zeros."""
        del reached
        return {}

    def _draft(self, block: Block, group: dict[str, Any], sums: Sums, local: Local) -> Draft:
        """A layer after this step's samples."""
        state, part = self.state.get(block.weight, {}), sums.parts.get(block.names[0])
        part = None if part is None or part.input is None else part
        new = int(part is not None)
        stale = Curvature.is_stale(state.get("age", 0) + new, state.get("updates", 0) + new, local.period)
        curvature, gradient = Curvature.unknown(), torch.empty(0)
        with self._crew.guarded():
            curvature = self._updated(block, part, group["factor_decay"], sums.grad_scale)
            gradient = self._gradient(block, local.scale or 1.0)
        return Draft(block, group, curvature, gradient, stale or block.names[0] in sums.missing)

    def _updated(self, block: Block, part: Gathered | None, decay: float, grad_scale: float) -> Curvature:
        curvature = self._curvature(block)
        if part is not None:
            curvature = Curvature.updated(curvature, part, decay, grad_scale)
        if curvature is None:
            raise CaptureError(
                f"Layer {block.name!r} has a gradient and its forward was never seen: call the model itself in the "
                "loop (model(x), not a part of it), or leave the layer to AdamW with skip=."
            )
        return curvature if self._shards.keeps(block) else curvature.without_decomposition()

    def _blocks_of(self, group: dict[str, Any]) -> list[Block]:
        """Layers of a group that have a gradient."""
        mine = {id(p) for p in group["params"]}
        return [b for b in self._blocks.values() if id(b.weight) in mine and b.weight.grad is not None]

    def _gradient(self, block: Block, scale: float) -> Tensor:
        return self._summed(block) / self._divisor(scale)

    def _summed(self, block: Block) -> Tensor:
        """What all backwards of the step have left in ``p.grad``, as one matrix."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in block.params]
        return block.join(grads).to(torch.promote_types(block.weight.dtype, torch.float32))

    def _divisor(self, scale: float) -> float:
        """What ``p.grad`` is to be divided by, to be the gradient of the step."""
        return scale

    def _schedule(self, step: int) -> None:
        values = {name: schedule(step) for name, schedule in self._schedules.items()}
        for group in self.param_groups:
            prefix = "adamw_" if group["method"] == "adamw" else ""
            group.update({name: values[prefix + name] for name in ("lr", "weight_decay") if prefix + name in values})
            group.update({name: value for name, value in values.items() if name not in {"lr", "weight_decay"}})
            check_group(group)

    def _size(self) -> Tensor:
        """A number that is finite where all gradients are, and what was gathered on their way."""
        grads = [p.grad for p in self._trained() if p.grad is not None]
        if not grads:
            raise CaptureError("No parameter has a gradient: call loss.backward() before step().")
        if any(grad.is_sparse or grad.is_complex() for grad in grads):
            raise InvalidOptionError("A gradient is sparse or complex: use dense real parameters.")
        sizes = [size for part in self._gathered().parts.values() for size in part.sizes()]
        return total([*torch._foreach_norm(grads), *sizes])

    # How many numbers `_direction` tells of a layer.
    _num_found = 0

    def _direction(self, draft: Draft, sums: Sums) -> Found:
        """The preconditioned gradient of a layer, ``[d_out, d_in (+ 1)]``, and what a subclass tells of it."""
        del sums
        return draft.curvature.basis.precondition(draft.gradient, draft.group["damping"]), None

    def _finish(self, plan: list[tuple[dict[str, Any], list[Planned]]], scale: float) -> None:
        """Check the update, then change parameters and state: nothing before this line has."""
        layers = [layer for _, mine in plan for layer in mine]
        found: list[Tensor] = []
        with self._crew.guarded():
            clips = [clip_factor(group, mine) for group, mine in plan]
            found = [total_norm([layer.direction for layer in layers]), *clips]
        if self._crew.ranks is not None:
            found = self._crew.verdict(found, 1 + len(plan), self._trained()[0].device)
        numbers, clips = read(found), found[1:]
        if not math.isfinite(numbers[0]):
            raise NonFiniteError(
                "The update holds NaN or infinity; parameters and optimizer state are unchanged. Remedy: raise "
                "damping, or skip such steps with on_nonfinite='skip'."
            )
        for (group, mine), clip in zip(plan, numbers[1:], strict=True):
            for dtype in {p.dtype for layer in mine for p in layer.block.params}:
                reach = max(1.0, float(group["lr"])) * clip * numbers[0]
                check_magnitude(reach, dtype, "lower lr, raise damping, or set kl_clip")
        for (group, mine), nu in zip(plan, clips, strict=True):
            params = [p for layer in mine for p in layer.block.params]
            moves = [m for layer in mine for m in layer.block.split(layer.direction * nu.to(layer.direction.device))]
            descend(params, [m.to(p.dtype) for m, p in zip(moves, params, strict=True)], self.state, group)
        for group in self.param_groups:
            if group["method"] == "adamw":
                adamw_step(group, self.state, self._divisor(scale))
        for layer in layers:
            self.state[layer.block.weight].update(layer.curvature.state())
        memory = self._memory
        self.diagnostics = KFACDiagnostics(
            update_norm=numbers[0],
            clip=min(numbers[1:], default=1.0),
            num_decompositions=sum(layer.is_fresh for layer in layers),
            num_failures=sum(layer.curvature.failures for layer in layers),
            num_skipped=memory["num_skipped"],
        )
        memory["steps"] += 1
