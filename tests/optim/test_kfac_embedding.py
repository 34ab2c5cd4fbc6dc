"""KFAC's one-sided factor of an embedding against the linear layer of one-hot inputs that it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest as st
from optim.kfac_runs import DOUBLE, EVERY, FISHERS, SOLVERS
from steepest.errors import CaptureError, InvalidOptionError, UnsupportedModelError

VOCABULARY, WIDTH, CLASSES, LENGTH, BATCH = 7, 4, 3, 5, 6


class Words(nn.Module):
    """Mean of the embeddings of some tokens, then a linear layer."""

    def __init__(self, *, one_hot: bool, padding_idx: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=DOUBLE)
        self.table: nn.Module
        if one_hot:
            self.table = nn.Linear(VOCABULARY, WIDTH, bias=False, dtype=DOUBLE)
        else:
            self.table = nn.Embedding(VOCABULARY, WIDTH, dtype=DOUBLE, padding_idx=padding_idx)
        self.head = nn.Linear(WIDTH, CLASSES, dtype=DOUBLE)
        with torch.no_grad():
            self.table.weight.copy_(table.T if one_hot else table)
            self.head.weight.copy_(torch.randn(CLASSES, WIDTH, generator=generator, dtype=DOUBLE))
            self.head.bias.zero_()
        self.one_hot = one_hot

    def forward(self, tokens: Tensor) -> Tensor:
        words = self.table(F.one_hot(tokens, VOCABULARY).to(DOUBLE) if self.one_hot else tokens)
        return self.head(torch.tanh(words).mean(1))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY - 1, (BATCH, LENGTH), generator=generator)  # the last token is never seen
    tokens[0] = tokens[0, 0]  # a token that comes several times in one sample
    return tokens, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def trained(make: Callable[..., st.KFAC], *, one_hot: bool, **options: Any) -> Tensor:
    """The table ``[num_embeddings, d]`` after some steps."""
    model = Words(one_hot=one_hot)
    opt = make(model, lr=0.1, kl_clip=None, damping=1e-2, **EVERY, **options)
    for seed in range(4):
        tokens, labels = batch(seed)
        opt.zero_grad()
        F.cross_entropy(model(tokens), labels).backward()
        opt.step()
    opt.close()
    table = model.table.weight.detach()
    return table.T if one_hot else table


@pytest.mark.parametrize("fisher", FISHERS.values(), ids=FISHERS)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("make", [st.KFAC, st.FOP])
def test_an_embedding_is_a_linear_layer_of_one_hot_inputs(make: Any, solver: Any, fisher: Any) -> None:
    options = {"solver": solver, "fisher": fisher}
    found = trained(make, one_hot=False, embeddings="kronecker", **options)
    expected = trained(make, one_hot=True, **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(found, Words(one_hot=False).table.weight), "nothing was trained"
    by_adamw = trained(make, one_hot=False, **options)
    assert not torch.allclose(found, by_adamw)


def test_a_token_that_was_never_seen_stays_where_it_was() -> None:
    for solver in SOLVERS.values():
        table = trained(st.KFAC, one_hot=False, embeddings="kronecker", solver=solver)
        torch.testing.assert_close(table[-1], Words(one_hot=False).table.weight[-1], rtol=0, atol=0)


def test_padding_gets_no_gradient_and_leaves_the_gradients_factor_alone() -> None:
    """Beside it, only the share of the other tokens in A falls: padding counts as a position."""
    tokens, labels = batch()
    padded = torch.cat([tokens, torch.full_like(tokens, VOCABULARY - 1)], 1)
    model = Words(one_hot=False, padding_idx=-1)
    with torch.no_grad():
        model.table.weight[-1] = 0
    factors = {}
    for name, given, scale in (("plain", tokens, 1), ("padded", padded, 2)):
        opt = st.KFAC(model, lr=0.0, embeddings="kronecker", factor_decay=0.0)
        opt.zero_grad()
        # The mean over twice the tokens, half of them zero, doubled: the same output and the same gradients.
        F.cross_entropy(model(given) * scale - (scale - 1) * model.head.bias, labels).backward()
        opt.step()
        opt.close()
        factors[name] = opt.state[model.table.weight]
    torch.testing.assert_close(factors["padded"]["grad_factor"], factors["plain"]["grad_factor"])
    torch.testing.assert_close(factors["padded"]["input_factor"][:-1], factors["plain"]["input_factor"][:-1] / 2)


def test_the_state_of_a_table_has_no_matrix_of_its_size() -> None:
    model = Words(one_hot=False)
    for solver in SOLVERS.values():
        opt = st.KFAC(model, embeddings="kronecker", solver=solver)
        tokens, labels = batch()
        F.cross_entropy(model(tokens), labels).backward()
        opt.step()
        state = opt.state[model.table.weight]
        tensors = [t for t in [*state.values(), *state["decomposition"].values()] if isinstance(t, Tensor)]
        assert (VOCABULARY, VOCABULARY) not in {tuple(t.shape) for t in tensors}
        assert state["input_factor"].shape == (VOCABULARY,)
        opt.close()
        opt.zero_grad()


def test_who_trains_an_embedding_is_listed() -> None:
    model = Words(one_hot=False)
    left = repr(st.KFAC(model))
    assert "table.weight: an embedding, which embeddings='kronecker' would give a factor" in left
    assert "    table: 7 x 4" in repr(st.KFAC(model, embeddings="kronecker"))
    scaled = nn.Sequential(nn.Embedding(3, 2, scale_grad_by_freq=True), nn.Linear(2, 2))
    assert "0.weight: an embedding with max_norm, scale_grad_by_freq or sparse" in repr(
        st.KFAC(scaled, embeddings="kronecker")
    )
    with pytest.raises(InvalidOptionError, match="embeddings='both'"):
        st.KFAC(model, embeddings="both")  # type: ignore[arg-type]


class Positions(nn.Module):
    """An embedding of positions, which are the same for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = nn.Embedding(LENGTH, WIDTH, dtype=DOUBLE), nn.Linear(WIDTH, CLASSES, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.positions(torch.arange(LENGTH))).mean(1))


def test_an_embedding_of_positions_is_refused_by_name(teaches: Callable[[Exception], None]) -> None:
    model = Positions()
    opt = st.KFAC(model, embeddings="kronecker")
    with pytest.raises((UnsupportedModelError, CaptureError), match="positions") as caught:
        model(torch.randn(BATCH, LENGTH, WIDTH, dtype=DOUBLE))
    teaches(caught.value)
    opt.close()
    opt = st.KFAC(model, embeddings="kronecker", skip="positions")
    F.cross_entropy(model(torch.randn(BATCH, LENGTH, WIDTH, dtype=DOUBLE)), batch()[1]).backward()
    opt.step()
    opt.close()
