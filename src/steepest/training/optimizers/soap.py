"""SOAP, from the package pytorch-optimizer."""

from collections.abc import Iterable

from torch import nn

from steepest.training.optimizer import OptimizerEntry
from steepest.training.rivals import Joined, load
from steepest.training.steps import backward_step


class SOAP(Joined):
    """Adam in the eigenbasis of Shampoo's preconditioner. Its first step only measures and moves nothing.

    Args:
        params: Parameters.
        lr: Learning rate.
        betas: Of Adam; the second also of the preconditioner.
        weight_decay: Decoupled weight decay.
        precondition_frequency: Steps between two updates of the eigenbasis.
        max_precondition_dim: Sides of a parameter that are longer keep the identity.
        precondition_1d: Whether vectors are preconditioned too.
        normalize_gradient: Whether every update is scaled to mean square 1.
        eps: Added to Adam's denominator.

    References:
        Vyas et al., arXiv 2409.11321.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        weight_decay: float = 1e-2,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10_000,
        precondition_1d: bool = False,
        normalize_gradient: bool = False,
        eps: float = 1e-8,
    ) -> None:
        package = load("pytorch_optimizer", "pytorch-optimizer", "SOAP")
        options = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_precondition_dim": max_precondition_dim,
            "precondition_1d": precondition_1d,
            "normalize_gradient": normalize_gradient,
            "eps": eps,
        }
        super().__init__([package.SOAP(params, **options)])


ENTRIES = [
    OptimizerEntry(
        name="soap",
        label="SOAP",
        description="SOAP of the package pytorch-optimizer: Adam in the eigenbasis of Shampoo's preconditioner",
        constructor=lambda: SOAP,
        takes="parameters",
        step=lambda _options: backward_step,
        lr_range=(3e-4, 3e-1),
        colour="#00A800",
    )
]
