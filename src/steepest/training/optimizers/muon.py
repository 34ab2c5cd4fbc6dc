"""Muon, from torch, with AdamW for what is no matrix."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import nn

from steepest._validation import check_choice, check_integer, check_real
from steepest.errors import InvalidOptionError
from steepest.training.optimizer import Diagnosis, OptimizerEntry
from steepest.training.rivals import Joined, MissingPackageError
from steepest.training.steps import backward_step

_FIRST_TORCH = "2.9"


class MuonWithAdamW(Joined):
    """Muon for matrices, AdamW for biases, norms, convolutions and, by default, the first and the last matrix.

    Muon's authors leave embeddings and the layer that makes the outputs to AdamW. Which parameter is which is told
    by shape and order alone. A convolution's kernel is no matrix here.

    Args:
        params: The parameters of a model in their order.
        lr: Learning rate of both.
        adamw_lr: Learning rate of AdamW, if it is another one.
        momentum: Share of the past in Muon's running mean.
        nesterov: Whether Muon looks one step ahead.
        ns_steps: Iterations that make an update orthogonal.
        weight_decay: Decoupled weight decay of both; above 0 this is what some call MuonW.
        adjust_lr_fn: How Muon's rate follows the shape: "match_rms_adamw" gives updates of the size of AdamW's, so
            that one rate serves both, "original" is that of its first author.
        ends: What trains the first and the last matrix.
        betas: Of AdamW.

    References:
        Jordan et al., https://kellerjordan.github.io/posts/muon; Liu et al., arXiv 2502.16982.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float = 3e-3,
        adamw_lr: float | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        ends: Literal["adamw", "muon"] = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        check_real("lr", lr, low=0)
        check_real("momentum", momentum, low=0, high=1, open_high=True)
        check_real("weight_decay", weight_decay, low=0)
        check_integer("ns_steps", ns_steps, low=1)
        check_choice("adjust_lr_fn", adjust_lr_fn, ("match_rms_adamw", "original"))
        check_choice("ends", ends, ("adamw", "muon"))
        kind = _muon()
        matrices, rest = _sorted_out(list(params), ends)
        self._ends = ends
        self.num_matrices = len(matrices)
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            parts.append(
                kind(
                    matrices,
                    lr=lr,
                    momentum=momentum,
                    nesterov=nesterov,
                    ns_steps=ns_steps,
                    weight_decay=weight_decay,
                    adjust_lr_fn=adjust_lr_fn,
                )
            )
        if rest:
            rate = lr if adamw_lr is None else check_real("adamw_lr", adamw_lr, low=0)
            parts.append(torch.optim.AdamW(rest, lr=rate, betas=betas, weight_decay=weight_decay))
        super().__init__(parts)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step.

        Args:
            closure: As in torch.optim.

        Returns:
            What the closure returned.

        Raises:
            InvalidOptionError: If Muon trains nothing: the numbers would be AdamW's under Muon's name.
        """
        if not self.num_matrices:
            last = " but the first and the last one, which ends='adamw' gives to AdamW: set muon.ends=muon"
            raise InvalidOptionError(
                f"the model has no matrices{last if self._ends == 'adamw' else ''}, or compare adamw instead"
            )
        return super().step(closure)


def _sorted_out(params: list[nn.Parameter], ends: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What Muon trains, and what AdamW does."""
    params = [param for param in params if param.requires_grad]
    matrices = [param for param in params if param.ndim == 2]
    chosen = matrices if ends == "muon" else matrices[1:-1]
    known = {id(param) for param in chosen}
    return chosen, [param for param in params if id(param) not in known]


def _muon() -> Callable[..., torch.optim.Optimizer]:
    found: Callable[..., torch.optim.Optimizer] | None = getattr(torch.optim, "Muon", None)
    if found is None:
        raise MissingPackageError(
            f"Muon comes from torch {_FIRST_TORCH} or later, this is torch {torch.__version__}: install a newer torch"
        )
    return found


def _diagnose(optimizer: torch.optim.Optimizer) -> Diagnosis:
    return {"matrices": float(getattr(optimizer, "num_matrices", 0))}


ENTRIES = [
    OptimizerEntry(
        name="muon",
        label="Muon",
        description="torch.optim.Muon on matrices; AdamW on all else, the first and the last matrix included",
        constructor=lambda: MuonWithAdamW,
        takes="parameters",
        step=lambda _options: backward_step,
        lr_range=(3e-4, 3e-1),
        diagnose=_diagnose,
        colour="#3030E0",
    )
]
