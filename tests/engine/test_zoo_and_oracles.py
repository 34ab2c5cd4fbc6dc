"""The truths are judged before they judge: autograd row by row against torch.func, and the dense solves."""

from __future__ import annotations

import pytest
import torch

from oracles import dense, entry_truth, functional_jacobian, minimum_norm, trainable, truncated_pinv
from zoo import ZOO, Entry

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented"),
]


def test_names_are_unique() -> None:
    names = [entry.name for entry in ZOO]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("entry", [e for e in ZOO if e.one_by_one], ids=lambda e: e.name)
def test_autograd_rows_equal_torch_func(entry: Entry) -> None:
    model, batch = entry.build()
    rows, alone = entry_truth(entry, model, batch), functional_jacobian(entry, model, batch)
    assert list(rows) == list(alone) == list(trainable(model))
    scale = dense(rows).abs().max().item()
    for name, truth in rows.items():
        torch.testing.assert_close(alone[name], truth, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("entry", ZOO, ids=lambda e: e.name)
def test_building_is_repeatable_and_private(entry: Entry) -> None:
    state = torch.get_rng_state()
    (first, x), (second, y) = entry.build(), entry.build()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_minimum_norm_is_the_untruncated_pinv() -> None:
    J = torch.randn(4, 9, dtype=torch.float64)
    J[3] = J[0] + J[1]  # rank-deficient: the minimum norm is what decides
    r = J @ torch.randn(9, dtype=torch.float64)
    d = minimum_norm(J, r)
    torch.testing.assert_close(J @ d, r)
    torch.testing.assert_close(truncated_pinv(J) @ r, d)
    torch.testing.assert_close(truncated_pinv(J), torch.linalg.pinv(J))


def test_truncated_pinv_keeps_the_leading_directions() -> None:
    U, V = (torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64)).Q for n in (5, 7))
    J = U @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.1], dtype=torch.float64)) @ V.T
    two = V[:, :2] @ torch.diag(torch.tensor([0.25, 0.5], dtype=torch.float64)) @ U[:, :2].T
    torch.testing.assert_close(truncated_pinv(J, rank=2), two)
    torch.testing.assert_close(truncated_pinv(J, rtol=0.3), two)
    half = V[:, :1] @ U[:, :1].T / 2
    torch.testing.assert_close(truncated_pinv(J, rank=1, exponent=0.5), half)
