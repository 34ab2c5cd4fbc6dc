"""Numbers of KFAC that may be functions of the step, and when its factors are updated."""

from collections.abc import Callable, Mapping
from typing import Any

from steepest._validation import check_integer, check_real

__all__ = ["Period", "Schedule", "at_step", "check_group", "is_due"]

Schedule = float | Callable[[int], float]
Period = int | Callable[[int], int]
# One batch says little about the curvature: so many steps at the start all update the factors.
_FIRST_STEPS = 10


def at_step(name: str, period: Period, step: int) -> int:
    """The period in a step, checked."""
    return check_integer(name, period(step) if callable(period) else period, low=1)


def is_due(period: int, step: int) -> bool:
    """Whether a step updates the factors."""
    return step < min(period, _FIRST_STEPS) or step % period == 0


def check_group(group: Mapping[str, Any]) -> None:
    """Check the numbers of a parameter group.

    Args:
        group: The group.
    """
    check_real("lr", group["lr"], low=0)
    check_real("weight_decay", group["weight_decay"], low=0)
    check_real("damping", group["damping"], low=0)
    check_real("momentum", group["momentum"], low=0, high=1, open_high=True)
    check_real("factor_decay", group["factor_decay"], low=0, high=1, open_high=True)
    if group["kl_clip"] is not None:
        check_real("kl_clip", group["kl_clip"], low=0, open_low=True)
