"""Kronecker factors and damped inverses against another implementation: curvlinops (install with `make peers`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest as st

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed: `make peers`")

DAMPING = 0.03
CLASSES = 3


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES, bias=False)), (6, 4)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, (3, 2), stride=2, padding=1, dilation=(1, 2)),
            nn.ReLU(),
            nn.Conv2d(3, 2, 2),
            nn.Flatten(),
            nn.Linear(8, CLASSES),
        ),
        (24, 2, 6, 6),
    ),
    "sequence": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)), (5, 4, 4)),
}
each = [
    pytest.param(model, sharing, loss, fisher, id=f"{model}-{sharing}-{loss}-{fisher}")
    for model in MODELS
    for sharing in ("expand", "reduce")
    for loss in ("mse", "cross_entropy", "bce")
    for fisher in ("empirical", "type-2")
]


class First(nn.Module):
    """Bring the classes to where torch's cross-entropy wants them."""

    def forward(self, out: Tensor) -> Tensor:
        return out.movedim(-1, 1)


class Case:
    """One model with one batch; our optimizer after a step that moves nothing, and their operator."""

    def __init__(self, model: str, sharing: Any, loss: str, fisher: str) -> None:
        make, shape = MODELS[model]
        torch.manual_seed(0)
        self.model = make().double()
        self.x = torch.randn(shape, dtype=torch.float64)
        lead = shape[:-1] if model == "sequence" else shape[:1]
        self.loss: nn.Module
        if loss == "mse":
            self.loss, self.y = nn.MSELoss(), torch.randn(*lead, CLASSES, dtype=torch.float64)
        elif loss == "bce":
            self.loss, self.y = nn.BCEWithLogitsLoss(), torch.randint(2, (*lead, CLASSES)).double()
        else:
            self.loss, self.y = nn.CrossEntropyLoss(), torch.randint(CLASSES, lead)
        self.sharing, self.fisher = sharing, fisher
        # Their gradients of losses that are a mean over the components too are larger by the root of their number.
        self.unit = CLASSES if fisher == "empirical" and loss != "cross_entropy" else 1
        self.exact = {
            "mse": st.Exact("gaussian", scale=2 / CLASSES),
            "cross_entropy": st.Exact("categorical"),
            "bce": st.Exact("bernoulli"),
        }[loss]
        # Theirs is the Hessian of a mean over the components, ours of the sum: that of a likelihood.
        self.hessian = CLASSES if loss == "bce" and fisher == "type-2" else 1

    def swapped(self, out: Tensor) -> Tensor:
        return out.movedim(-1, 1) if out.ndim > 2 and isinstance(self.loss, nn.CrossEntropyLoss) else out

    def ours(self, solver: Any, steps: int = 1, **options: Any) -> st.KFAC:
        fisher = st.Empirical() if self.fisher == "empirical" else self.exact
        opt = st.KFAC(
            self.model, lr=0.0, momentum=0.0, kl_clip=None, damping=DAMPING, solver=solver, fisher=fisher,
            sharing=self.sharing, loss_terms="positions", **options,
        )  # fmt: skip
        for _ in range(steps):
            opt.zero_grad()
            self.loss(self.swapped(self.model(self.x)), self.y).backward()
            opt.step()
        opt.close()
        return opt

    def theirs(self, kind: Any) -> Any:
        last = isinstance(self.loss, nn.CrossEntropyLoss) and self.x.ndim == 3
        model = nn.Sequential(self.model, First()) if last else nn.Sequential(self.model)
        return kind(
            model, self.loss, list(self.model.parameters()), [(self.x, self.y)], fisher_type=self.fisher,
            kfac_approx=self.sharing, separate_weight_and_bias=False, check_deterministic=False,
        )  # fmt: skip

    @property
    def scale(self) -> float:
        """Their S over ours."""
        return self.unit / self.hessian


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model", "sharing", "loss", "fisher"), each)
def test_the_factors_equal_those_of_curvlinops(model: str, sharing: str, loss: str, fisher: str) -> None:
    case = Case(model, sharing, loss, fisher)
    opt, operator = case.ours(st.Eigenbasis()), case.theirs(curvlinops.KFACLinearOperator)
    operator.compute_kronecker_factors()
    for block in opt._blocks.values():
        state = opt.state[block.weight]
        a, s = state["input_factor"] / state["weight"], state["grad_factor"] / state["weight"]
        torch.testing.assert_close(a, operator._input_covariances[f"0.{block.name}"])
        torch.testing.assert_close(s * case.scale, operator._gradient_covariances[f"0.{block.name}"])


def directions(case: Case, opt: st.KFAC, damping: float) -> list[Tensor]:
    """Our damped inverse times a fixed gradient, for all parameters in order."""
    found: list[Tensor] = []
    for block in opt._blocks.values():
        curvature = opt._curvature(block)
        assert curvature is not None
        found += block.split(curvature.basis.precondition(block.join(vectors(block.params)), damping))
    return found


def vectors(params: Any) -> list[Tensor]:
    return [torch.linspace(-1, 2, p.numel(), dtype=p.dtype).view_as(p) for p in params]


DAMPED = {
    "exact": (st.Eigenbasis(), "KFACLinearOperator", {"use_exact_damping": True}),
    "heuristic": (st.Cholesky(), "KFACLinearOperator", {"use_heuristic_damping": True}),
    "corrected": (st.EigenbasisCorrected(), "EKFACLinearOperator", {"use_exact_damping": True}),
}

INVERTED = [
    (model, sharing, damping)
    for model, sharing in (("mlp", "expand"), ("cnn", "expand"), ("cnn", "reduce"), ("sequence", "reduce"))
    for damping in DAMPED
    if (model, damping) != ("sequence", "corrected")  # their EKFAC takes outputs [N, C] only
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fisher", ["empirical", "type-2"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize(("model", "sharing", "damping"), INVERTED)
def test_the_damped_inverse_equals_that_of_curvlinops(
    model: str, sharing: str, damping: str, loss: str, fisher: str
) -> None:
    solver, kind, options = DAMPED[damping]
    case = Case(model, sharing, loss, fisher)
    # One step decomposes; the second takes the second moment of EKFAC, all of it with factor_decay 0.
    opt = case.ours(solver, steps=2, factor_decay=0.0, factor_update_steps=1, inverse_update_steps=1)
    operator = case.theirs(getattr(curvlinops, kind))
    inverse = curvlinops.KFACInverseLinearOperator(operator, damping=DAMPING * case.scale, **options)
    expected = inverse @ vectors(case.model.parameters())
    for ours, theirs in zip(directions(case, opt, DAMPING), expected, strict=True):
        torch.testing.assert_close(ours, theirs * case.scale, rtol=1e-6, atol=1e-8)
