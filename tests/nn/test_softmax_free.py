"""Softmax-free attention as a function: the formula, its gradients, masks, samples that do not touch, edges."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as hs
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from attending import dense, gaussian, runs
from steepest.errors import InvalidOptionError
from steepest.linalg import gaussian as kernels
from steepest.nn import CholeskyInverse, NewtonInverse
from steepest.nn.functional import average_landmarks, diagnose_attention, softmax_free_attention

INVERSES = [CholeskyInverse(), NewtonInverse(), NewtonInverse(steps=6)]
attend = softmax_free_attention


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mask_of(*rows: str) -> Tensor:
    """One row per sequence; "x" is a token that is not there."""
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


# The formula


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3, 4.0])
@pytest.mark.parametrize(("count", "number", "width"), [(9, 4, 3), (8, 4, 1), (1, 1, 5), (5, 49, 2), (3, 1, 1)])
def test_it_is_the_formula(count: int, number: int, width: int, scale: float | None, normalize: bool) -> None:
    query, value, given = made(2, 3, count, width), made(2, 3, count, 4, seed=1), made(2, 3, number, width, seed=2)
    options: dict[str, Any] = {"scale": scale, "normalize": normalize}
    inverse = CholeskyInverse(ridge=0.05)
    found = attend(query, value, given, **options, inverse=inverse)
    averaged = attend(query, value, number, **options, inverse=inverse)
    newton = attend(query, value, given, **options, inverse=NewtonInverse(ridge=0.05))
    for index in ((i, j) for i in range(2) for j in range(3)):
        exact = dense(query[index], value[index], given[index], **options, ridge=0.05)
        torch.testing.assert_close(found[index], exact, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(newton[index], exact, rtol=1e-6, atol=1e-6)
        points = torch.stack([query[index][group].mean(0) for group in runs(list(range(count)), number)])
        exact = dense(query[index], value[index], points, **options, ridge=0.05)
        torch.testing.assert_close(averaged[index], exact, rtol=1e-10, atol=1e-12)


def test_all_tokens_as_landmarks_and_little_ridge_give_the_dense_kernel() -> None:
    query, value = made(12, 3), made(12, 5, seed=1)
    exact = gaussian(query, query, scale=2.0) @ value
    errors = []
    for ridge in (1e-4, 1e-8):
        found = attend(query, value, query, scale=2.0, normalize=False, inverse=CholeskyInverse(ridge))
        errors.append((found - exact).abs().max().item())
    assert errors[1] < 1e-6 < 1e-4 < errors[0] < 1e-2


@pytest.mark.parametrize("inverse", INVERSES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_of_first_and_second_order(inverse: Any, normalize: bool) -> None:
    """Of a Newton iteration that is not done, too: they are those of what was computed."""
    inputs = made(1, 5, 2), made(1, 5, 2, seed=1), made(1, 3, 2, seed=2)
    for tensor in inputs:
        tensor.requires_grad_()
    mask = mask_of("..x..")

    def function(query: Tensor, value: Tensor, points: Tensor) -> Tensor:
        return attend(query, value, points, key_padding_mask=mask, normalize=normalize, inverse=inverse)

    assert gradcheck(function, inputs, atol=1e-6, check_batched_grad=inverse == INVERSES[1])
    assert gradgradcheck(function, inputs, atol=1e-6)


@pytest.mark.parametrize("points", ["averaged", "given"])
def test_gradients_are_those_of_the_formula_with_and_without_a_graph_of_their_own(points: str) -> None:
    """Also where one tensor is query, value and the origin of the landmarks."""
    x = made(9, 3).requires_grad_()
    landmarks = made(4, 3, seed=1) if points == "given" else 4
    averaged = torch.stack([x[group].mean(0) for group in runs(list(range(9)), 4)])
    exact = torch.autograd.grad(dense(x, x, averaged if points == "averaged" else landmarks).square().sum(), x)
    for graph in (False, True):
        found = torch.autograd.grad(attend(x, x, landmarks).square().sum(), x, create_graph=graph)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)


def test_newton_with_steps_that_suffice_is_cholesky_and_with_few_it_is_told_apart() -> None:
    query, value = made(2, 30, 4).requires_grad_(), made(2, 30, 3, seed=1)
    results = []
    for inverse in (CholeskyInverse(), NewtonInverse(), NewtonInverse(steps=3)):
        out = attend(query, value, 7, inverse=inverse)
        residual = diagnose_attention(query, 7, inverse=inverse).residual
        results.append((out, torch.autograd.grad(out.square().sum(), query)[0], residual))
    torch.testing.assert_close(results[1][:2], results[0][:2], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(results[2][0], results[0][0], rtol=0.05)
    assert (results[0][2] < 1e-12).all()
    assert (results[1][2] < 1e-7).all()
    assert (results[2][2] > 0.05).all()


def test_dropout_drops_shares_of_tokens_and_keeps_the_mean() -> None:
    query, value = made(1, 6, 2).requires_grad_(), made(1, 6, 3, seed=1)
    exact = attend(query, value, 3)
    torch.manual_seed(1)
    draws = torch.stack([attend(query, value, 3, dropout_p=0.3) for _ in range(2000)])
    assert draws.std(0).min() > 1e-3
    torch.testing.assert_close(draws.mean(0), exact, rtol=0, atol=0.15)
    torch.manual_seed(2)
    first = attend(query, value, 3, dropout_p=0.3)
    torch.manual_seed(2)
    assert torch.equal(first, attend(query, value, 3, dropout_p=0.3))
    assert torch.autograd.grad(first.sum(), query)[0].isfinite().all()


# Tokens that are not there


@settings(max_examples=40)
@given(
    mask=hs.lists(hs.booleans(), min_size=1, max_size=14),
    number=hs.integers(1, 6),
    normalize=hs.booleans(),
    inverse=hs.sampled_from(INVERSES),
)
def test_a_masked_token_is_a_token_less(mask: list[bool], number: int, normalize: bool, inverse: Any) -> None:
    """Outputs and gradients, whatever masked tokens hold; few Newton steps depend on how many landmarks there are."""
    gone, options = torch.tensor(mask), {"normalize": normalize, "inverse": inverse}
    query, value = made(len(mask), 3), made(len(mask), 2, seed=1)
    query[gone], value[gone] = torch.nan, torch.inf
    query.requires_grad_()
    value.requires_grad_()
    found = attend(query, value, number, key_padding_mask=gone, **options)
    found.square().sum().backward()
    assert not found[gone].any()
    assert not query.grad[gone].any()
    assert not value.grad[gone].any()
    if gone.all():
        return
    if inverse == INVERSES[2] and number > (~gone).sum():
        return
    left, others = query.detach()[~gone].requires_grad_(), value.detach()[~gone].requires_grad_()
    alone = attend(left, others, number, **options)
    alone.square().sum().backward()
    torch.testing.assert_close(found[~gone], alone, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(query.grad[~gone], left.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value.grad[~gone], others.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inverse", INVERSES[:2], ids=str)
def test_a_masked_landmark_is_a_landmark_less(inverse: Any) -> None:
    query, value, points = made(2, 8, 3), made(2, 8, 4, seed=1), made(2, 5, 3, seed=2)
    gone = mask_of("..x.x", ".xx..")
    points[gone] = torch.nan
    found = attend(query, value, points, landmark_padding_mask=gone, inverse=inverse)
    for sample in range(2):
        alone = attend(query[sample], value[sample], points[sample][~gone[sample]], inverse=inverse)
        torch.testing.assert_close(found[sample], alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("inverse", INVERSES, ids=str)
def test_a_sequence_of_which_nothing_is_there_gives_zeros(inverse: Any) -> None:
    query, value = made(2, 2, 6, 3, dtype=torch.float32).requires_grad_(), made(2, 2, 6, 3, dtype=torch.float32)
    out = attend(query, value, 4, key_padding_mask=mask_of("xxxxxx", ".x....").unsqueeze(1), inverse=inverse)
    assert not out[0].any()
    assert out[1, :, [0, 2, 3, 4, 5]].all()
    out.sum().backward()
    assert query.grad.isfinite().all()
    assert not query.grad[0].any()


# Samples of a batch


@pytest.mark.parametrize("inverse", INVERSES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_sample_depends_on_the_others_of_its_batch(dtype: torch.dtype, inverse: Any) -> None:
    """Bit for bit while the others change, NaN among them; to rounding while their number changes."""

    def results(others: Tensor, fill: float | None = None) -> list[Tensor]:
        query = torch.cat([made(1, 11, 4, dtype=dtype), others]).requires_grad_()
        value = torch.cat([made(1, 11, 3, seed=1, dtype=dtype), others[..., :3]]).requires_grad_()
        out = attend(query, value, 5, inverse=inverse)
        assert fill is None or (out[1:].isnan().all() and out[0].isfinite().all())
        return [out[0], *(g[0] for g in torch.autograd.grad(out[0].square().sum(), (query, value)))]

    first = results(made(3, 11, 4, seed=2, dtype=dtype))
    more = [
        results(1e3 * made(3, 11, 4, seed=3, dtype=dtype)),
        results(torch.full((3, 11, 4), torch.nan).to(dtype), 1.0),
    ]
    for a, b, c in zip(first, *more, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    torch.testing.assert_close(results(made(0, 11, 4, dtype=dtype)), first, rtol=1e-4, atol=1e-5)


# Numbers at the edge


@pytest.mark.parametrize("inverse", INVERSES[:2], ids=str)
@pytest.mark.parametrize("number", [1, 4, 50])
def test_identical_tokens_share_their_values(inverse: Any, number: int) -> None:
    query, value = torch.full((9, 4), 0.7), made(9, 3, dtype=torch.float32)
    parts = min(number, 9)
    expected = (parts / (parts * (parts + 0.01))) * value.sum(0).expand(9, 3)
    torch.testing.assert_close(attend(query, value, number, inverse=inverse), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("inverse", INVERSES, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e3, 1e10, 1e17, 1e30])
@pytest.mark.parametrize("width", [1, 8])
def test_huge_and_tiny_tokens_stay_finite(width: int, size: float, inverse: Any) -> None:
    query = made(2, 40, width, dtype=torch.float32) * size
    query[1, :] = query[1, torch.arange(40) % 3]  # clusters of equal tokens
    query.requires_grad_()
    out = attend(query, made(2, 40, 3, dtype=torch.float32), 7, inverse=inverse)
    assert out.isfinite().all()
    assert out.abs().max() < 1e3
    out.sum().backward()
    assert query.grad.isfinite().all()


def test_landmarks_far_from_all_tokens_give_zeros_and_the_diagnosis_tells() -> None:
    query, value = made(2, 9, 3), made(2, 9, 3)
    assert not attend(query, value, 100 + 50 * made(2, 4, 3, seed=1)).any()
    assert (diagnose_attention(query, 100 + 50 * made(2, 4, 3, seed=1)).coverage == 0).all()
    near = diagnose_attention(query, query)
    torch.testing.assert_close(near.coverage, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_is_near_float64_for_many_tokens(offset: float) -> None:
    query, value = made(16_384, 32) + offset, made(16_384, 16, seed=1)
    exact = attend(query, value, 49)
    found = attend(query.float(), value.float(), 49)
    assert (found - exact).norm() < 2e-5 * exact.norm() * (1 + offset)


# What is diagnosed


def test_the_diagnosis_is_that_of_the_landmarks_kernel() -> None:
    query, points, mask = made(2, 9, 3), made(2, 4, 3, seed=1), mask_of("....", "...x")
    there = mask_of(".........", "..x..x...")
    query[there] = torch.nan
    found = diagnose_attention(
        query, points, key_padding_mask=there, landmark_padding_mask=mask, inverse=CholeskyInverse(0.1)
    )
    for sample in range(2):
        left, tokens = points[sample][~mask[sample]], query[sample][~there[sample]]
        values = torch.linalg.eigvalsh(gaussian(left, left, 3**-0.5)) + 0.1
        torch.testing.assert_close(found.condition[sample], values[-1] / values[0])
        torch.testing.assert_close(found.coverage[sample], gaussian(tokens, left, 3**-0.5).amax(1).mean())
    assert (found.residual < 1e-14).all()


def test_a_sample_of_nan_does_not_hide_the_diagnosis_of_the_others() -> None:
    query = made(3, 9, 4)
    query[1, 3] = torch.nan
    found, others = diagnose_attention(query, 4), diagnose_attention(query[[0, 2]], 4)
    for name in ("condition", "residual", "coverage"):
        assert getattr(found, name)[1].isnan()
        torch.testing.assert_close(getattr(found, name)[[0, 2]], getattr(others, name), rtol=1e-6, atol=1e-12)


# Types, modes, memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_within(dtype: torch.dtype) -> None:
    """Exactly what float32 gives for the same numbers, narrowed once at the end."""
    query, value = made(2, 20, 8, dtype=dtype), made(2, 20, 4, seed=1, dtype=dtype)
    wide = attend(query.float(), value.float(), 5)
    assert torch.equal(attend(query, value, 5), wide.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(attend(query.float(), value.float(), 5), wide)
        query = query.float().requires_grad_()
        found = torch.autograd.grad(attend(query, value.float(), 5).sum(), query)
    assert torch.equal(found[0], torch.autograd.grad(attend(query, value.float(), 5).sum(), query)[0])


@pytest.mark.parametrize("inverse", INVERSES, ids=str)
def test_modes_and_layouts_change_nothing(inverse: Any) -> None:
    base, value = made(9, 2, 4), made(9, 2, 3, seed=1)
    expected = attend(base.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous(), 4, inverse=inverse)
    torch.testing.assert_close(attend(base.transpose(0, 1), value.transpose(0, 1), 4, inverse=inverse), expected)
    with torch.inference_mode():
        assert torch.equal(
            attend(base.permute(1, 2, 0).contiguous().mT, value.transpose(0, 1), 4, inverse=inverse), expected
        )
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(attend(base.transpose(0, 1), value.transpose(0, 1), 4, inverse=inverse), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    shapeless = base.transpose(0, 1).to("meta").requires_grad_()
    out = attend(shapeless, value.transpose(0, 1).to("meta"), 4, inverse=inverse)
    out.sum().backward()
    assert out.shape == expected.shape
    assert shapeless.grad.shape == shapeless.shape


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    tensors = [made(1, 6, 3), made(1, 6, 3, seed=1), made(1, 4, 3, seed=2)]
    for tensor in tensors:
        tensor.requires_grad_()
        attend(*tensors).sum().backward()
        assert [t.grad is not None for t in tensors] == [t is tensor for t in tensors]
        tensor.requires_grad_(False)
        tensor.grad = None


class Sizes(TorchDispatchMode):
    """Notes every storage that any operation makes."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.found, self.largest = least, [], 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.largest = max(self.largest, size)
                if size >= self.least and all(seen() is None or seen() is not tensor for seen, _ in self.found):
                    self.found.append((weakref.ref(tensor), tensor.untyped_storage().data_ptr()))
        return out


@pytest.mark.parametrize("inverse", INVERSES[:2], ids=str)
def test_memory_is_one_kernel_of_tokens_times_landmarks(inverse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of tokens times tokens; the kernel is the one tensor of its size, forward and backward."""
    monkeypatch.setattr(kernels, "_CPU_PIECE", 1 << 16)
    count, number, width = 2000, 20, 8
    query, value = made(count, width).requires_grad_(), made(count, width, seed=1).requires_grad_()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with Sizes(count * number) as sizes:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = attend(query, value, number, inverse=inverse)
        out.sum().backward()
    assert sizes.largest == count * number
    assert len({pointer for _, pointer in sizes.found}) == 1
    assert sum(saved.values()) <= count * (number + 2 * width) + 3 * number * (number + width)


# torch.func


@pytest.mark.parametrize("inverse", INVERSES, ids=str)
def test_torch_func_maps_over_it(inverse: Any) -> None:
    query, value, mask = made(3, 7, 2), made(3, 7, 2, seed=1), mask_of(".......", ".....xx", "x.x....")

    def function(query: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return attend(query, value, 3, key_padding_mask=mask, inverse=inverse)

    whole = function(query, value, mask)
    torch.testing.assert_close(torch.func.vmap(function)(query, value, mask), whole, rtol=1e-10, atol=1e-12)
    masks = torch.func.vmap(function, in_dims=(None, None, 0))(query[0], value[0], mask)
    torch.testing.assert_close(masks[2], function(query[0], value[0], mask[2]), rtol=1e-10, atol=1e-12)
    found = torch.func.jacrev(function)(query[1], value[1], mask[1])
    exact = torch.autograd.functional.jacobian(lambda q: function(q, value[1], mask[1]), query[1])
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)


# What cannot be


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"is_causal": True}, "cannot be causal.*Use torch.nn.functional.scaled_dot_product_attention"),
        ({"query": torch.ones(4)}, r"query is torch.float32 of shape \(4,\): give floating point"),
        ({"query": torch.ones(2, 5, 3, dtype=torch.long)}, "query is torch.int64.*give floating point"),
        ({"query": torch.ones(2, 0, 3)}, r"shape \(2, 0, 3\): give"),
        ({"value": torch.ones(2, 4, 3)}, r"value is .*\(2, 4, 3\) and query has \(2, 5, 3\)"),
        ({"value": torch.ones(5, 3)}, r"one value for each of them, floating point \[..., n, e\]"),
        ({"value": torch.ones(2, 5, 3, dtype=torch.long)}, "value is torch.int64"),
        (
            {"value": torch.ones(2, 5, 3, dtype=torch.float64)},
            "value is torch.float64 and query is torch.float32: make both",
        ),
        ({"landmarks": torch.ones(2, 4, 2)}, r"landmarks have the shape \(2, 4, 2\) and query has \(2, 5, 3\)"),
        ({"landmarks": torch.ones(4, 3)}, "they may differ in the number of points alone, so give"),
        ({"landmarks": torch.ones(2, 0, 3)}, "with m at least 1"),
        ({"landmarks": 0}, "num_landmarks=0: give an integer of at least 1"),
        ({"landmark_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}, "only their number was given"),
        ({"key_padding_mask": torch.zeros(2, 5)}, "key_padding_mask is torch.float32.*give booleans"),
        ({"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}, r"broadcast to \(2, 5\)"),
        ({"key_padding_mask": torch.zeros(2, 1, dtype=torch.bool)}, r"broadcast to \(2, 5\)"),
        ({"key_padding_mask": torch.zeros(1, 2, 5, dtype=torch.bool)}, r"broadcast to \(2, 5\)"),
        ({"dropout_p": 1.0}, r"dropout_p=1.0: give a finite number in \[0, 1\)"),
        ({"scale": 0.0}, r"scale=0.0: give a finite number in \(0, inf"),
    ],
)
def test_what_makes_no_attention_is_told(changed: dict[str, Any], message: str, teaches: Any) -> None:
    arguments = {"query": torch.ones(2, 5, 3), "value": torch.ones(2, 5, 3), "landmarks": 3} | changed
    with pytest.raises(InvalidOptionError, match=message) as caught:
        attend(**arguments)
    teaches(caught.value)


@pytest.mark.parametrize("options", [{"ridge": 0.0}, {"ridge": -1.0}, {"ridge": torch.nan}])
@pytest.mark.parametrize("kind", [CholeskyInverse, NewtonInverse])
def test_a_ridge_is_above_zero(kind: Any, options: dict[str, float]) -> None:
    with pytest.raises(InvalidOptionError, match=r"ridge=.*: give a finite number in \(0, inf"):
        kind(**options)


@pytest.mark.parametrize("steps", [0, 2.5])
def test_steps_are_whole_and_above_zero(steps: int) -> None:
    with pytest.raises(InvalidOptionError, match=r"steps=.*: give an integer of at least 1"):
        NewtonInverse(steps=steps)


def test_landmarks_by_number_are_the_averages() -> None:
    query, value = made(2, 11, 3), made(2, 11, 3, seed=1)
    assert torch.equal(attend(query, value, 4), attend(query, value, average_landmarks(query, 4)[0]))
