"""Landmarks: every token in one of nearly equal parts, and tokens that are not there nowhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as hs
from torch import Tensor

from attending import cells, runs
from steepest.errors import InvalidOptionError
from steepest.nn.functional import average_landmarks
from steepest.nn.landmarks import pad_to_multiple


def tokens_of(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def means(tokens: Tensor, groups: list[list[int]]) -> Tensor:
    return torch.stack([tokens[..., group, :].mean(-2) for group in groups], -2)


@settings(max_examples=50)
@given(count=hs.integers(1, 40), number=hs.integers(1, 45))
def test_runs_are_of_nearly_equal_length_and_leave_no_token_out(count: int, number: int) -> None:
    tokens = tokens_of(2, count, 3)
    landmarks, absent = average_landmarks(tokens, number)
    assert absent is None
    assert landmarks.shape == (2, min(count, number), 3)
    torch.testing.assert_close(landmarks, means(tokens, runs(list(range(count)), number)), rtol=1e-12, atol=1e-14)
    # The weight of every token in every landmark, from the means of unit vectors.
    weights = average_landmarks(torch.eye(count, dtype=torch.float64), number)[0]
    lengths = (weights > 0).sum(1)
    assert lengths.sum() == count
    assert lengths.max() - lengths.min() <= 1
    assert ((weights > 0).sum(0) == 1).all()
    assert torch.equal((weights > 0).double().argmax(0), (weights > 0).double().argmax(0).sort().values)


@settings(max_examples=50)
@given(mask=hs.lists(hs.booleans(), min_size=1, max_size=30), number=hs.integers(1, 12), seed=hs.integers(0, 9))
def test_masked_tokens_count_nowhere(mask: list[bool], number: int, seed: int) -> None:
    """The landmarks that are there are those of the sequence without the masked tokens, whatever these hold."""
    tokens, gone = tokens_of(2, len(mask), 3, seed=seed), torch.tensor(mask)
    tokens[0, gone] = torch.nan
    tokens[1, gone] = torch.inf
    landmarks, absent = average_landmarks(tokens, number, key_padding_mask=gone)
    assert absent is not None
    assert landmarks.isfinite().all()
    left = tokens[:, ~gone]
    expected = average_landmarks(left, number)[0] if left.shape[1] else left
    assert torch.equal(absent, torch.arange(landmarks.shape[1]) >= expected.shape[1])
    torch.testing.assert_close(landmarks[:, ~absent], expected, rtol=1e-12, atol=1e-14)


def test_every_sequence_of_a_batch_has_a_mask_of_its_own() -> None:
    tokens, mask = tokens_of(3, 2, 9, 4), torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 4:], mask[1, ::2], mask[2] = True, True, True
    landmarks, absent = average_landmarks(tokens, 3, key_padding_mask=mask.unsqueeze(1))
    assert landmarks.shape == (3, 2, 3, 4)
    assert absent is not None
    assert absent.shape == (3, 1, 3)
    for sample in range(2):
        alone = average_landmarks(tokens[sample][:, ~mask[sample]], 3)[0]
        torch.testing.assert_close(landmarks[sample], alone)
    assert not absent[:2].any()
    assert absent[2].all()


@settings(max_examples=50)
@given(height=hs.integers(1, 12), width=hs.integers(1, 12), number=hs.integers(1, 60))
def test_the_cells_of_a_map_form_a_grid_of_at_most_as_many(height: int, width: int, number: int) -> None:
    weights = average_landmarks(torch.eye(height * width, dtype=torch.float64), number, size=(height, width))[0]
    found = [row.nonzero().flatten().tolist() for row in weights]
    assert 1 <= len(found) <= number
    rows = len({group[0] // width for group in found})
    assert found == cells((height, width), rows, len(found) // rows)
    assert sorted(t for group in found for t in group) == list(range(height * width))


@pytest.mark.parametrize(
    ("size", "number", "grid"),
    [((56, 56), 49, (7, 7)), ((7, 7), 49, (7, 7)), ((10, 40), 16, (2, 8)), ((40, 10), 16, (8, 2))],
)
def test_cells_are_as_square_as_they_can_be(size: tuple[int, int], number: int, grid: tuple[int, int]) -> None:
    tokens = tokens_of(math.prod(size), 2)
    torch.testing.assert_close(average_landmarks(tokens, number, size=size)[0], means(tokens, cells(size, *grid)))


def test_a_mask_empties_cells_and_moves_none() -> None:
    tokens, mask = tokens_of(24, 2), torch.zeros(24, dtype=torch.bool)
    mask[:12] = mask[14] = True
    tokens[mask] = torch.nan
    groups = cells((4, 6), 2, 3)
    landmarks, absent = average_landmarks(tokens, 6, key_padding_mask=mask, size=(4, 6))
    assert absent.tolist() == [True] * 3 + [False] * 3
    torch.testing.assert_close(landmarks[3:], means(tokens, [[t for t in g if t != 14] for g in groups[3:]]))
    assert not landmarks[:3].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", [4, 5])
def test_half_precision_is_widened_and_autocast_does_not_narrow_it(dtype: torch.dtype, number: int) -> None:
    tokens = tokens_of(12, 8, dtype=dtype)
    exact = average_landmarks(tokens.double(), number)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (tokens, tokens.float()):
            landmarks = average_landmarks(given, number)[0]
            assert landmarks.dtype == torch.float32
            torch.testing.assert_close(landmarks.double(), exact, rtol=1e-6, atol=1e-6)


def test_the_gradient_of_a_masked_token_is_zero_even_if_it_holds_nan() -> None:
    tokens, mask = tokens_of(7, 2), torch.tensor([0, 0, 1, 0, 0, 0, 1], dtype=torch.bool)
    tokens[mask] = torch.nan
    tokens.requires_grad_()
    average_landmarks(tokens, 3, key_padding_mask=mask)[0].sum().backward()
    assert not tokens.grad[mask].any()
    assert tokens.grad[~mask].all()


@pytest.mark.parametrize("shape", [(7,), (8,), (5, 6), (4, 8), (1, 1)])
def test_maps_are_padded_with_zeros_at_the_end(shape: tuple[int, ...]) -> None:
    maps = tokens_of(2, 3, *shape)
    padded = pad_to_multiple(maps, 4)
    assert all(size % 4 == 0 and size - before < 4 for size, before in zip(padded.shape[2:], shape, strict=True))
    inside = (..., *(slice(0, size) for size in shape))
    assert torch.equal(padded[inside], maps)
    assert padded.count_nonzero() == maps.count_nonzero()


@pytest.mark.parametrize("size", [(3, 5), (12, 2), (-3, -4), (0, 12), (12,), (3, 2, 2)])
def test_a_size_that_is_not_that_of_the_tokens_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidOptionError, match=r"size=.* for 12 tokens: give the height and width"):
        average_landmarks(tokens_of(12, 2), 4, size=size)


@pytest.mark.parametrize("number", [0, -1, 2.0, True])
def test_a_number_that_is_none_is_refused(number: int) -> None:
    with pytest.raises(InvalidOptionError, match=r"num_landmarks=.*: give an integer of at least 1"):
        average_landmarks(tokens_of(12, 2), number)
