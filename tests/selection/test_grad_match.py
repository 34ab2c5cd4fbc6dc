"""GradMatch: pursuit against refits from scratch, weights that are never negative, and what fills up a share."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn import functional as F

from made_rows import chosen, feed, from_model, from_numbers
from steepest.errors import InvalidOptionError
from steepest.selection.grad_match import GradMatch
from steepest.selection.pursuit import GrowingCholesky, pursue


def made(count: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def columns(inputs: Tensor, errors: Tensor) -> np.ndarray:
    """Gradients ``[n, d_out d_in]`` written out."""
    return torch.einsum("no,ni->noi", errors.double(), inputs.double()).flatten(1).numpy()


def gradient(model: nn.Module, layer: nn.Module, inputs: Tensor, targets: Tensor) -> np.ndarray:
    """Gradient of one sample's loss in a layer, by autograd."""
    grads = torch.autograd.grad(F.cross_entropy(model(inputs), targets), list(layer.parameters()))
    return torch.cat([grad.flatten() for grad in grads]).double().numpy()


def least_squares(grads: np.ndarray, target: np.ndarray, penalty: float) -> np.ndarray:
    stacked = np.concatenate([grads.T, np.sqrt(penalty) * np.eye(len(grads))])
    return np.linalg.lstsq(stacked, np.concatenate([target, np.zeros(len(grads))]), rcond=None)[0]


def oracle(grads: np.ndarray, count: int, ridge: float, tolerance: float) -> tuple[list[int], np.ndarray, int]:
    """Matching pursuit with a refit from scratch at every step; a weight below zero leaves as it reaches zero."""
    target = grads.mean(0)
    penalty = ridge * (grads**2).sum(1).mean()
    taken: list[int] = []
    weights, dropped = np.zeros(0), 0
    while len(taken) < count:
        rest = target - weights @ grads[taken] if taken else target
        if np.linalg.norm(rest) <= tolerance * np.linalg.norm(target):
            break
        along = grads @ rest
        along[taken] = -np.inf
        if along.max() <= 1e-7:
            break
        taken.append(int(along.argmax()))
        weights = np.append(weights, 0.0)
        while (goal := least_squares(grads[taken], target, penalty)).min() <= 0:
            low = goal <= 0
            step = (weights[low] / (weights[low] - goal[low])).min()
            weights = weights + step * (goal - weights)
            gone = low & (weights <= 1e-12)
            taken = [t for t, g in zip(taken, gone, strict=True) if not g]
            weights, dropped = weights[~gone], dropped + int(gone.sum())
        weights = goal
    return taken, weights, dropped


@pytest.mark.parametrize(
    ("ridge", "count"), [(0.5, 1), (0.5, 20), (0.01, 20), (0.01, 60), (1e-3, 40), (1e-4, 30), (0.0, 3), (0.0, 12)]
)
@pytest.mark.parametrize("seed", range(3))
def test_a_pursuit_is_the_one_with_a_refit_from_scratch_at_every_step(seed: int, ridge: float, count: int) -> None:
    inputs, errors = made(80, 5, seed) + 0.3, made(80, 3, seed + 100)
    taken, weights, dropped = oracle(columns(inputs, errors), count, ridge, 1e-4)
    found = pursue(inputs.clone(), errors.clone(), count, ridge=ridge)
    assert found.chosen.tolist() == taken
    assert found.dropped == dropped
    np.testing.assert_allclose(found.weights.numpy(), weights, rtol=1e-4)


def test_the_cases_above_hold_some_in_which_columns_leave_again() -> None:
    assert pursue(made(80, 5, 2) + 0.3, made(80, 3, 102), 40, ridge=1e-3).dropped > 2


@given(st.integers(0, 10**6), st.integers(1, 25), st.integers(1, 4), st.integers(1, 3), st.sampled_from([0, 1e-3, 0.5]))
def test_weights_are_positive_and_the_best_for_their_columns(
    seed: int, count: int, width: int, outputs: int, ridge: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Small whole numbers: equal, opposite and zero gradients are common.
    inputs = torch.randint(-2, 3, (count, width), generator=generator).float()
    errors = torch.randint(-1, 2, (count, outputs), generator=generator).float()
    grads = columns(inputs, errors)
    found = pursue(inputs, errors, count, ridge=ridge)
    assert len(found.chosen.unique()) == len(found.chosen) == len(found.weights)
    if not len(found.chosen):
        assert found.residual == (0 if np.allclose(grads.mean(0), 0) else 1)
        return
    assert float(found.weights.min()) > 0
    kept = grads[found.chosen.numpy()]
    penalty = ridge * (grads**2).sum(1).mean()
    rest = grads.mean(0) - found.weights.numpy() @ kept
    np.testing.assert_allclose(kept @ rest, penalty * found.weights.numpy(), atol=1e-8)
    assert found.residual == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(grads.mean(0)), abs=1e-6)


def test_the_residual_never_grows_with_the_number_kept() -> None:
    inputs, errors = made(200, 8) + 0.2, made(200, 4, 2)
    residuals = [pursue(inputs.clone(), errors.clone(), k, ridge=0.01).residual for k in (1, 2, 5, 20, 50, 100)]
    assert all(after < before for before, after in pairwise(residuals))


def test_a_mean_in_the_span_of_a_few_is_matched_and_the_pursuit_ends() -> None:
    inputs, errors = made(50, 3) + 1, made(50, 1, 2).abs()
    found = pursue(inputs, errors, 50, ridge=0)
    assert len(found.chosen) <= 3
    assert found.residual <= 1e-4


def test_projections_are_inner_products_with_the_direction_of_the_mean() -> None:
    inputs, errors = made(50, 6) * 1e-3, made(50, 3, 2) * 7
    grads = columns(inputs, errors)
    mean = grads.mean(0)
    found = pursue(inputs, errors, 5)
    expected = grads @ (mean / np.linalg.norm(mean))
    np.testing.assert_allclose(found.projections.numpy(), expected, atol=1e-6 * abs(expected).max())


@given(st.integers(0, 10**6), st.lists(st.integers(0, 200), max_size=30))
def test_a_cholesky_factor_grows_and_shrinks_as_the_matrix_does(seed: int, removals: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(100, 40, generator=generator, dtype=torch.float64)
    matrix = rows @ rows.T + 0.1 * torch.eye(100)
    factor, held = GrowingCholesky(100), []
    for new in range(100):
        assert factor.append(matrix[held, new], float(matrix[new, new]))
        held.append(new)
        if new % 3 == 2 and removals:
            at = removals.pop() % len(held)
            factor.remove(at)
            held.pop(at)
    right = torch.randn(len(held), generator=generator, dtype=torch.float64)
    expected = torch.linalg.solve(matrix[held][:, held], right)
    torch.testing.assert_close(factor.solve(right), expected, rtol=1e-8, atol=1e-8)


def test_a_row_that_would_make_the_matrix_singular_is_refused_and_changes_nothing() -> None:
    factor = GrowingCholesky(4)
    assert factor.append(torch.zeros(0, dtype=torch.float64), 4.0)
    assert not factor.append(torch.tensor([2.0], dtype=torch.float64), 1.0)
    assert not factor.append(torch.tensor([2.0], dtype=torch.float64), 1.0 + 1e-12)
    assert not factor.append(torch.zeros(1, dtype=torch.float64), 0.0)
    assert factor.size == 1
    assert factor.solve(torch.tensor([8.0], dtype=torch.float64)).tolist() == [2.0]


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_model_are_matched_class_by_class(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=bias))
    inputs, targets = made(90, 4), torch.arange(90) % 3
    method = GradMatch(ridge=0.01)
    found = feed(method.begin(), from_model(model, inputs, targets, "2.weight")).pick(15, targets)
    grads = np.stack([gradient(model, model[2], inputs[i : i + 1], targets[i : i + 1]) for i in range(90)])
    for label in range(3):
        members = (targets == label).nonzero().squeeze(1)
        taken, weights, _ = oracle(grads[members], 5, 0.01, 1e-4)
        mine = targets[found.indices] == label
        assert found.indices[mine].tolist() == sorted(members[taken].tolist())
        order = np.argsort(taken)
        np.testing.assert_allclose(found.weights[mine].numpy(), (weights / weights.mean())[order], rtol=1e-3)
    assert found.notes == ()
    assert found.numbers["matched"] == 15


def test_the_kept_gradient_is_nearer_to_the_mean_gradient_than_that_of_random_samples() -> None:
    inputs, errors = made(600, 10), made(600, 4, 2) + 0.2
    grads = columns(inputs, errors)

    def cosine(gradient: np.ndarray) -> float:
        mean = grads.mean(0)
        return float(gradient @ mean / np.linalg.norm(gradient) / np.linalg.norm(mean))

    found = chosen(GradMatch(), inputs, 60, errors)
    random = [cosine(grads[np.random.default_rng(seed).permutation(600)[:60]].mean(0)) for seed in range(20)]
    assert cosine(found.weights.numpy() @ grads[found.indices.numpy()]) > 0.98 > max(random)


def test_weights_of_a_class_add_up_to_its_share_of_the_data() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    found = chosen(GradMatch(), made(100, 6), 30, made(100, 3, 2), labels)
    sums = [float(found.weights[labels[found.indices] == label].sum()) for label in range(3)]
    assert labels[found.indices].bincount().tolist() == [10, 10, 10]
    assert sums == pytest.approx([18, 9, 3], rel=1e-5)


def test_a_share_that_the_match_does_not_fill_is_drawn_at_random_with_the_mean_weight() -> None:
    inputs, errors = made(50, 3) + 1, made(50, 1, 2).abs()
    found = chosen(GradMatch(ridge=0.0), inputs, 20, errors)
    drawn = int(found.numbers["at_random"])
    assert found.numbers["matched"] + drawn == 20
    assert drawn >= 17
    assert int((found.weights == 1).sum()) == drawn
    assert float(found.weights[found.weights != 1].mean()) == pytest.approx(1, abs=1e-5)
    assert f"{drawn} samples were drawn at random" in found.notes[0]
    again = chosen(GradMatch(ridge=0.0), inputs, 20, errors)
    assert torch.equal(again.indices, found.indices)
    other = chosen(GradMatch(ridge=0.0, seed=1), inputs, 20, errors)
    assert not torch.equal(other.indices, found.indices)


def test_a_class_without_gradient_is_drawn_at_random_with_equal_weights() -> None:
    labels, errors = torch.arange(60) % 2, made(60, 3, 2)
    errors[labels == 1] = 0
    found = chosen(GradMatch(), made(60, 5), 20, errors, labels)
    mine = labels[found.indices] == 1
    assert int(mine.sum()) == 10
    assert bool((found.weights[mine] == 1).all())
    assert found.numbers["at_random"] == 10
    assert found.scores is not None
    assert not found.scores[labels == 1].any()


def test_all_samples_have_equal_weights_within_a_class() -> None:
    labels = torch.arange(30) % 3
    found = chosen(GradMatch(), made(30, 5), 30, made(30, 3, 2), labels)
    assert found.weights.tolist() == [1.0] * 30
    assert found.numbers == {"residual": 0, "matched": 30, "at_random": 0, "dropped": 0}


def test_a_layer_used_at_many_positions_is_approximated_and_said_so() -> None:
    inputs, errors = made(40, 12).view(40, 3, 4), made(40, 6, 2).view(40, 3, 2)
    found = chosen(GradMatch(), inputs, 10, errors)
    same = chosen(GradMatch(), inputs.mean(1), 10, errors.sum(1))
    assert torch.equal(found.indices, same.indices)
    assert torch.equal(found.scores, same.scores)
    assert "at up to 3 positions" in found.notes[0]
    assert same.notes == ()


def test_a_factor_of_the_loss_changes_nothing() -> None:
    inputs, errors = made(60, 5), made(60, 3, 2)
    expected = chosen(GradMatch(), inputs, 20, errors)
    for factor in (1024.0, 2.0**-60, 1e-30):
        found = chosen(GradMatch(), inputs, 20, errors * factor)
        assert torch.equal(found.indices, expected.indices)
        torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=0)


def test_a_cholesky_factor_beyond_the_limit_is_refused_with_the_remedy() -> None:
    run = feed(GradMatch(max_memory=4000).begin(), from_numbers(made(60, 5)))
    assert len(run.pick(22, None).indices) == 22
    with pytest.raises(InvalidOptionError, match=r"23 samples of one group.*4232 bytes.*max_memory=4000.*balanced"):
        run.pick(23, None)


@pytest.mark.parametrize("option", [{"ridge": -1.0}, {"ridge": float("nan")}, {"tolerance": -0.1}, {"seed": -1}])
def test_numbers_that_cannot_be_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(InvalidOptionError, match=next(iter(option))):
        GradMatch(**option)
