"""What Sven keeps from step to step, all of it in the optimizer's state."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.engine import Jacobian
from steepest.optim.system import Outcome, SvenDiagnostics, System, widened

__all__ = ["Memory"]

NORM_DECAY = 0.9  # of the running mean that the norm guard compares with

_START: dict[str, Any] = {"step": 0, "norm_mean": 0.0, "num_clipped": 0, "num_skipped": 0, "solver": None}


class Memory:
    """The state of a Sven: numbers of the optimizer as a whole, and directions and metrics of its layers.

    The numbers are kept with its first parameter, as in torch.optim.LBFGS.

    Args:
        state: The optimizer's.
        trained: The parameters that Sven trains.
        params: All parameters by name.
    """

    def __init__(
        self, state: MutableMapping[Tensor, Any], trained: Sequence[Tensor], params: Mapping[str, Tensor]
    ) -> None:
        self._state, self._trained, self._params = state, trained, params

    def __getitem__(self, name: str) -> Any:
        return self._state.get(self._trained[0], {}).get(name, _START[name])

    def change(self, **values: Any) -> None:
        """Change numbers of the optimizer, which are there from the first step on that does something."""
        self._state[self._trained[0]] = _START | self._state.get(self._trained[0], {}) | values

    def guard(self, norm: float, ratio: float | None) -> float:
        """Factor that keeps the norm of a step within bounds.

        Args:
            norm: Of the direction.
            ratio: Of the norm guard.

        Returns:
            The factor, 1 where nothing is to be shortened.
        """
        if ratio is None:
            return 1.0
        if self["step"] == 0:
            norms = torch._foreach_norm(list(self._trained))
            limit = float(torch.linalg.vector_norm(torch.stack([n.double().cpu() for n in norms])))
        else:
            limit = ratio * self["norm_mean"] / (1 - NORM_DECAY ** self["step"])
        # Parameters that are all zero, or updates that were so far, set no scale.
        return limit / norm if norm > limit > 0 else 1.0

    def layers(self) -> dict[str, dict[str, Any]]:
        """What the metric has kept of every layer so far."""
        found = {name: self._state[p].get("metric") for name, p in self._params.items() if p in self._state}
        return {name: state for name, state in found.items() if state}

    def previous(self, jacobian: Jacobian, index: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The direction of the step before.

        Args:
            jacobian: In whose columns.
            index: Output rows that it has kept, where not all.

        Returns:
            The direction by name; zeros at first.
        """
        found = {}
        for name, shape in jacobian.shapes.items():
            param = self._params[name]
            last = self._state[param].get("direction") if param in self._state else None
            if last is None:
                found[name] = torch.zeros(shape, dtype=jacobian.dtype, device=jacobian.device)
            else:
                found[name] = last if name not in index or param.ndim == 0 else last.index_select(0, index[name])
        return found

    def remember(self, system: System, outcome: Outcome) -> SvenDiagnostics:
        """Keep what a step has taught.

        Args:
            system: What it solved.
            outcome: What it came to.

        Returns:
            What there is to report.
        """
        solution, scale, step = outcome.solution, outcome.scale, self["step"]
        norm = solution.norm * scale
        self.change(
            step=step + 1,
            norm_mean=NORM_DECAY * self["norm_mean"] + (1 - NORM_DECAY) * norm,
            num_clipped=self["num_clipped"] + (scale < 1),
            solver=solution.memory,
        )
        if system.geometry is not None:
            for name, kept in system.geometry.states.items():
                self._state[self._params[name]]["metric"] = kept
        for name in system.previous or ():  # a momentum that leads nowhere is given up
            param = self._params[name]
            self._state[param].pop("direction", None)
            if outcome.direction is not None:
                self._state[param]["direction"] = widened(outcome.direction[name], param, system.index.get(name))
        return SvenDiagnostics(
            rows=system.jacobian.num_rows,
            rank=solution.rank,
            spectrum=solution.spectrum,
            noise_floor=solution.noise_floor,
            update_norm=norm,
            clipped=scale < 1,
            num_clipped=self["num_clipped"],
            num_skipped=self["num_skipped"],
            damping=solution.damping,
            length=solution.step,
            accepted=outcome.accepted,
            decay=system.decay,
        )
