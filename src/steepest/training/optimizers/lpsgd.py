"""LPSGD and LPSGDM, from steepest, with a p that falls over the budget of a run."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

import torch

from steepest._validation import check_real
from steepest.training.optimizer import Diagnosis, OptimizerEntry
from steepest.training.steps import backward_step

PSchedule = Literal["cosine", "linear", "constant"]


def _lpsgd() -> Callable[..., torch.optim.Optimizer]:
    from steepest.optim import LPSGD

    class AnnealedLPSGD(LPSGD):
        """LPSGD that brings its p to 2 over the budget."""

        def __init__(
            self, params: Iterable[Any], *, p_schedule: PSchedule = "cosine", warm_hold: float = 0.0, **options: Any
        ) -> None:
            super().__init__(params, **options)
            _remember(self, p_schedule, warm_hold)

    return AnnealedLPSGD


def _lpsgdm() -> Callable[..., torch.optim.Optimizer]:
    from steepest.optim import LPSGDM

    class AnnealedLPSGDM(LPSGDM):
        """LPSGDM that brings its p to 2 over the budget."""

        def __init__(
            self, params: Iterable[Any], *, p_schedule: PSchedule = "cosine", warm_hold: float = 0.0, **options: Any
        ) -> None:
            super().__init__(params, **options)
            _remember(self, p_schedule, warm_hold)

    return AnnealedLPSGDM


def _remember(optimizer: torch.optim.Optimizer, p_schedule: PSchedule, warm_hold: float) -> None:
    check_real("warm_hold", warm_hold, low=0, high=1, open_high=True)
    for group in optimizer.param_groups:
        group.update(initial_p=float(group["p"]), p_schedule=p_schedule, warm_hold=warm_hold)


def _anneal(optimizer: torch.optim.Optimizer, fraction: float) -> None:
    """The schedules of `steepest.optim.p_schedules` over the budget, whether it is one of epochs or of seconds."""
    from steepest.optim.p_schedules import cosine_p, linear_p

    for group in optimizer.param_groups:
        if group["p_schedule"] != "constant":
            curve = cosine_p if group["p_schedule"] == "cosine" else linear_p
            held = group["warm_hold"]
            group["p"] = curve(group["initial_p"], 2.0, max(0.0, fraction - held) / (1 - held))


def _diagnose(optimizer: torch.optim.Optimizer) -> Diagnosis:
    return {"p": cast(float, optimizer.param_groups[0]["p"])}


def _entry(
    name: str,
    label: str,
    description: str,
    colour: str,
    constructor: Callable[[], Callable[..., torch.optim.Optimizer]],
) -> OptimizerEntry:
    return OptimizerEntry(
        name=name,
        label=label,
        description=description,
        constructor=constructor,
        takes="parameters",
        step=lambda _options: backward_step,
        # With p = 2 the best rates are those of SGD, ten times as large with a running mean; with large p, of signs.
        lr_range=(1e-3, 10.0),
        anneal=_anneal,
        diagnose=_diagnose,
        colour=colour,
    )


ENTRIES = [
    _entry("lpsgd", "LPSGD", "steepest.LPSGD: descent in the l_p norm, p falls to 2 over the run", "#44AA99", _lpsgd),
    _entry("lpsgdm", "LPSGDM", "steepest.LPSGDM: LPSGD with momentum 0.9", "#882255", _lpsgdm),
]
