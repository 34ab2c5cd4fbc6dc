"""The reference versions of signSGD, Signum and Lion, against their papers' formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import steepest as st
from steepest.training.peers import Lion, SignSGD

Optimizers = Callable[..., Optimizer]


def gradients(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(count)]


def trained(kind: Optimizers, grads: list[Tensor], **options: Any) -> Tensor:
    param = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    opt = kind([param], **options)
    for grad in grads:
        param.grad = grad.clone()
        opt.step()
    return param.detach()


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_signsgd_and_signum_are_their_formulas(beta: float) -> None:
    theta, mean = torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for grad in gradients(5):
        mean = beta * mean + (1 - beta) * grad
        theta = (1 - 0.1 * 0.2) * theta - 0.1 * mean.sign()
    torch.testing.assert_close(trained(SignSGD, gradients(5), lr=0.1, momentum=beta, weight_decay=0.2), theta)


def test_lion_is_its_formula() -> None:
    theta, mean = torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for grad in gradients(5):
        update = (0.9 * mean + 0.1 * grad).sign()
        theta = theta - 0.1 * (update + 0.2 * theta)
        mean = 0.99 * mean + 0.01 * grad
    torch.testing.assert_close(trained(Lion, gradients(5), lr=0.1, weight_decay=0.2), theta)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_signum_is_lpsgdm_with_large_p(beta: float) -> None:
    ours = trained(st.LPSGDM, gradients(5), lr=0.1, momentum=beta, weight_decay=0.2, p=1e9, eps=1e-30)
    torch.testing.assert_close(ours, trained(SignSGD, gradients(5), lr=0.1, momentum=beta, weight_decay=0.2))


@pytest.mark.parametrize("kind", [SignSGD, Lion])
def test_a_resumed_run_is_the_same(kind: Optimizers) -> None:
    param = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    opt = kind([param], lr=0.1)
    for grad in gradients(3):
        param.grad = grad
        opt.step()
    other = torch.nn.Parameter(param.detach().clone())
    resumed = kind([other], lr=0.1)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for each, own in ((param, opt), (other, resumed)):
        each.grad = gradients(1)[0]
        own.step()
    assert torch.equal(param, other)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SignSGD, {"lr": -1.0}, r"lr=-1\.0"),
        (SignSGD, {"momentum": 1.0}, r"momentum=1\.0"),
        (Lion, {"betas": (0.9, 1.0)}, r"betas\[1\]=1\.0"),
        (Lion, {"weight_decay": -0.1}, r"weight_decay=-0\.1"),
    ],
)
def test_impossible_options_are_refused(kind: Optimizers, options: dict[str, Any], message: str) -> None:
    with pytest.raises(st.InvalidOptionError, match=message):
        kind([torch.nn.Parameter(torch.ones(2))], **options)
