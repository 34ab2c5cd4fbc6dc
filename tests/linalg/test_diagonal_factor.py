"""A diagonal input factor, that of an embedding, without damping."""

from __future__ import annotations

import pytest
import torch

from steepest.linalg.decompositions import EigenDecomposition
from steepest.linalg.kronecker import Eigenbasis, EigenbasisCorrected, KroneckerSolver


@pytest.mark.parametrize("solver", [Eigenbasis(), EigenbasisCorrected()], ids=repr)
def test_rare_tokens_of_a_large_table_are_no_rounding(solver: KroneckerSolver) -> None:
    """Beside 100,000 tokens the bound on the rounding of a matrix of that size would be one hundredth."""
    frequencies = torch.full((100_000,), 1e-6)
    frequencies[0], frequencies[1] = 0.9, 0.0
    block = solver.decompose(frequencies, torch.eye(2), 0.0)
    assert isinstance(block, EigenDecomposition)
    found = block.precondition(torch.ones(2, len(frequencies)), 0.0)
    expected = torch.where(frequencies > 0, frequencies.reciprocal(), 0).expand(2, -1)
    torch.testing.assert_close(found, expected)
