"""The engine on a CUDA device gives the CPU's numbers."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest as st


def unreduced(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.gpu
def test_reductions_and_a_step_on_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    original = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    ).double()
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % 5
    grams, losses = [], []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(original).to(device)
        closure = partial(unreduced, model, x.to(device), y.to(device))
        capture = st.Capture(model)
        with capture:
            rows = closure()
        grams.append(capture.jacobian(rows).gram().cpu())
        losses.append(st.Sven(model).step(closure).cpu())
    torch.testing.assert_close(grams[0], grams[1])
    torch.testing.assert_close(losses[0], losses[1])
