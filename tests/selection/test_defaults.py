"""What the caller has set for all of torch plays no part in a selection: dtype, device, inference mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import steepest as st
from steepest.selection import SelectionSampler

LOSS = nn.CrossEntropyLoss(reduction="none")
METHODS: list[Any] = [
    st.SAGE(),
    st.SAGE(consensus="sketch", weights="class"),
    st.SAGE(consensus="sketch", keep_projections=True, rule=st.Strata(spread=None), class_policy="global"),
    st.SAGE(scope="all", sketch_size=4, rule=st.RandomAboveCut()),
    st.Random(),
    st.EL2N(),
    st.GraNd(),
    st.Herding(),
    st.KCenter(),
    st.GradMatch(),
]


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def settings(name: str) -> Any:
    return {
        "float64": default_dtype,
        "another device": lambda: torch.device("meta"),  # stands for CUDA: what is made there cannot be read here
        "inference mode": torch.inference_mode,
    }[name]()


def problem() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, (torch.randn(80, 6), torch.arange(80) % 3)


@pytest.mark.parametrize("setting", ["float64", "another device", "inference mode"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_selection_is_the_same_whatever_the_defaults_of_torch(method: Any, setting: str, tmp_path: Any) -> None:
    model, data = problem()
    plain = st.select_subset(model, data, LOSS, fraction=0.2, method=method, batch_size=32)
    with settings(setting):
        found = st.select_subset(model, data, LOSS, fraction=0.2, method=method, batch_size=32)
        found.save(tmp_path / "subset")
        read = st.Selection.load(tmp_path / "subset")
    for selection in (found, read):
        for name in ("indices", "scores", "weights", "labels"):
            one, other = getattr(plain, name), getattr(selection, name)
            assert (one is None) == (other is None)
            if one is not None:
                assert torch.equal(one, other)
                assert (one.dtype, one.device) == (other.dtype, other.device)
                assert not other.is_inference()


def test_weights_chosen_in_inference_mode_take_part_in_training() -> None:
    model, data = problem()
    with torch.inference_mode():
        selection = st.select_subset(model, data, LOSS, fraction=0.2, method=st.GradMatch())
    kept = selection.indices
    (LOSS(model(data[0][kept]), data[1][kept]) * selection.weights).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("weights", [torch.ones(5), torch.arange(5.0)], ids=["equal", "unequal"])
def test_a_sampler_draws_under_another_default_device(weights: torch.Tensor) -> None:
    def drawn() -> list[int]:
        return list(SelectionSampler(torch.arange(5), weights, seed=3))

    plain = drawn()
    with torch.device("meta"):
        assert list(SelectionSampler(torch.arange(5, device="cpu"), weights, seed=3)) == plain


def test_the_rank_of_a_sketch_does_not_count_rounding() -> None:
    model, data = problem()
    # The 3 output gradients of cross-entropy add up to zero, so 2 are free, times 5 inputs and the bias.
    selection = st.select_subset(model, data, LOSS, fraction=0.2, method=st.SAGE(sketch_size=64), batch_size=32)
    assert selection.report.numbers["sketch_rank"] == 12
