"""Schedules of p, in the manner of torch's schedules of the learning rate."""

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from steepest._validation import check_integer, check_real
from steepest.errors import InvalidOptionError

__all__ = ["ConstantP", "CosineAnnealingP", "LinearAnnealingP", "PScheduler", "cosine_p", "linear_p"]


def cosine_p(p_max: float, p_min: float, fraction: float) -> float:
    """From p_max to p_min along half a cosine.

    Args:
        p_max: p at the start.
        p_min: p at the end.
        fraction: How much of the way is done, 0 to 1.

    Returns:
        p.

    Example:
        >>> [round(cosine_p(4.0, 2.0, fraction), 6) for fraction in (0.0, 0.5, 1.0)]
        [4.0, 3.0, 2.0]
    """
    return p_min + (p_max - p_min) * (1 + math.cos(math.pi * fraction)) / 2


def linear_p(p_max: float, p_min: float, fraction: float) -> float:
    """From p_max to p_min along a line.

    Args:
        p_max: p at the start.
        p_min: p at the end.
        fraction: How much of the way is done, 0 to 1.

    Returns:
        p.

    Example:
        >>> linear_p(4.0, 2.0, 0.25)
        3.5
    """
    return p_min + (p_max - p_min) * (1 - fraction)  # p_min at the end, also where p_max is huge


class PScheduler:
    """Writes ``p`` into the parameter groups of an optimizer; base class of the schedules.

    Every value follows in closed form from the number of the period and the p that a group started with, so a schedule
    can be joined with any of torch's, also in a ``ChainedScheduler``, and be stepped by steps or by epochs. A p that is
    a tensor is written in place, which a captured graph sees.

    Args:
        optimizer: `LPSGD`, `LPSGDM` or any other whose groups have a ``p``.
        last_epoch: Number of the last period; -1 to begin.

    Raises:
        InvalidOptionError: If a group has no p, one that cannot be scheduled, or none to go on from.
    """

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        if not isinstance(optimizer, Optimizer):
            raise InvalidOptionError(f"{type(optimizer).__name__} is no torch.optim.Optimizer: pass the optimizer.")
        self.optimizer = optimizer
        self.last_epoch = check_integer("last_epoch", last_epoch, low=-1)
        for number, group in enumerate(optimizer.param_groups):
            if "p" not in group:
                raise InvalidOptionError(
                    f"Parameter group {number} of {type(optimizer).__name__} has no p to schedule: use steepest.LPSGD "
                    "or steepest.LPSGDM."
                )
            if isinstance(group["p"], Tensor) and not group["p"].is_floating_point():
                raise InvalidOptionError(
                    f"p of parameter group {number} is a tensor of {group['p'].dtype}, which cannot hold what lies "
                    "between integers: give a tensor of floating-point numbers, or a number."
                )
            if last_epoch == -1:
                group.setdefault("initial_p", float(group["p"]))
            elif "initial_p" not in group:
                raise InvalidOptionError(
                    f"last_epoch={last_epoch}, and parameter group {number} does not know the p it started with: load "
                    "the optimizer's state_dict first, or begin with last_epoch=-1."
                )
        self.base_ps = [float(group["initial_p"]) for group in optimizer.param_groups]
        self._check()
        self.step()

    def _check(self) -> None:
        """Refuse starting values that the schedule cannot have."""

    def p_at(self, period: int, base_p: float) -> float:
        """The value in a period.

        Args:
            period: Its number, from 0.
            base_p: The p that the group started with.

        Returns:
            p.
        """
        del period
        return base_p

    def step(self) -> None:
        """Go to the next period; call it after the optimizer's step, or at the end of an epoch."""
        self.last_epoch += 1
        self._write()

    def get_last_p(self) -> list[float]:
        """The p of every parameter group in this period."""
        return [self.p_at(self.last_epoch, base) for base in self.base_ps]

    def _write(self) -> None:
        groups, values = self.optimizer.param_groups, self.get_last_p()
        if len(groups) != len(values):
            raise InvalidOptionError(
                f"The optimizer has {len(groups)} parameter groups, and had {len(values)} when {type(self).__name__} "
                "was made: make the schedule after add_param_group."
            )
        for group, value in zip(groups, values, strict=True):
            if isinstance(group["p"], Tensor):
                group["p"].fill_(value)
            else:
                group["p"] = value

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer."""
        return {name: value for name, value in vars(self).items() if name != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another schedule was; p is written too, so the order of loading does not matter.

        Args:
            state_dict: Of a schedule of the same kind.

        Raises:
            InvalidOptionError: If it is of another kind.
        """
        if state_dict.keys() != self.state_dict().keys():
            raise InvalidOptionError(
                f"The state has {', '.join(map(str, state_dict))}, and {type(self).__name__} needs "
                f"{', '.join(self.state_dict())}: load the state of a schedule of the same kind."
            )
        vars(self).update(state_dict)
        self._write()


class ConstantP(PScheduler):
    """Leaves p as every group has it: no schedule, for loops that expect one.

    Args:
        optimizer: `LPSGD` or `LPSGDM`.
        last_epoch: Number of the last period; -1 to begin.
    """


class _Annealing(PScheduler):
    """From the p of every group down to p_min, in T_max periods."""

    def __init__(
        self, optimizer: Optimizer, T_max: int, p_min: float = 2.0, *, warm_hold: int = 0, last_epoch: int = -1
    ) -> None:
        self.T_max = check_integer("T_max", T_max, low=1)
        self.p_min = check_real("p_min", p_min, low=2)
        self.warm_hold = check_integer("warm_hold", warm_hold, low=0)
        if warm_hold >= T_max:
            raise InvalidOptionError(
                f"warm_hold={warm_hold} with T_max={T_max}: all periods would be held and p would never come down; "
                "give fewer than T_max."
            )
        super().__init__(optimizer, last_epoch)

    def _check(self) -> None:
        for number, base in enumerate(self.base_ps):
            if base < self.p_min:
                raise InvalidOptionError(
                    f"p={base:g} of parameter group {number} is p_max, where the schedule starts, and is below "
                    f"p_min={self.p_min:g}: give the optimizer a larger p or the schedule a smaller p_min."
                )

    def _fraction(self, period: int) -> float:
        """How much of the way down is done, 0 to 1; the last period is at the end, also if it is the only one."""
        if period < self.warm_hold:
            return 0.0
        way = self.T_max - 1 - self.warm_hold
        return min(1.0, (period - self.warm_hold) / way) if way else 1.0


class CosineAnnealingP(_Annealing):
    r"""Brings p from the value of every group, p_max, down to p_min along half a cosine.

    .. math:: p_s = p_{min} + \tfrac12 (p_{max} - p_{min}) \Bigl(1 + \cos \frac{\pi (s - 1)}{S - 1}\Bigr),
       \qquad s = 1, \dots, S

    with S = T_max; for S = 1 it is p_min. Early steps are nearly as long in every direction, whatever its curvature,
    and the late ones are those of SGD. Call ``step()`` once per epoch, or once per step with T_max steps.

    Args:
        optimizer: `LPSGD` or `LPSGDM`; the p of each group, at least p_min, is its p_max.
        T_max: Periods of the whole run, epochs or steps: the first is at p_max, the last at p_min. (In torch's
            CosineAnnealingLR the minimum comes one period later, and then the rate rises again; p stays.)
        p_min: Where p ends, 2 or more.
        warm_hold: Periods at p_max before the descent, fewer than T_max.
        last_epoch: Number of the last period; -1 to begin.

    Raises:
        InvalidOptionError: If an option is impossible, or a group's p is below p_min.

    References:
        LPSGD, arXiv 2606.02078.

    Example:
        >>> import torch, steepest as st
        >>> opt = st.LPSGDM(torch.nn.Linear(2, 1).parameters(), lr=0.1, p=4.0)
        >>> schedule, seen = st.CosineAnnealingP(opt, T_max=5), []
        >>> for epoch in range(5):
        ...     seen += schedule.get_last_p()
        ...     opt.step()  # an epoch of steps
        ...     schedule.step()
        >>> [round(p, 3) for p in seen]
        [4.0, 3.707, 3.0, 2.293, 2.0]
    """

    def p_at(self, period: int, base_p: float) -> float:
        """The value in a period.

        Args:
            period: Its number, from 0.
            base_p: p_max of the group.

        Returns:
            p.
        """
        return cosine_p(base_p, self.p_min, self._fraction(period))


class LinearAnnealingP(_Annealing):
    """Brings p from the value of every group down to p_min along a line; as `CosineAnnealingP` in all else.

    Args:
        optimizer: `LPSGD` or `LPSGDM`; the p of each group is its p_max.
        T_max: Periods of the whole run, epochs or steps: the first is at p_max, the last at p_min.
        p_min: Where p ends, 2 or more.
        warm_hold: Periods at p_max before the descent, fewer than T_max.
        last_epoch: Number of the last period; -1 to begin.

    Raises:
        InvalidOptionError: If an option is impossible, or a group's p is below p_min.
    """

    def p_at(self, period: int, base_p: float) -> float:
        """The value in a period.

        Args:
            period: Its number, from 0.
            base_p: p_max of the group.

        Returns:
            p.
        """
        return linear_p(base_p, self.p_min, self._fraction(period))
