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
from zoo_parts import Net

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


@pytest.mark.parametrize("shape", [(8,), (1, 8), (16,), (1, 16)])
@pytest.mark.parametrize("make", [st.KFAC, st.FOP])
def test_positions_whose_number_fits_the_batch_by_chance_are_no_batch(
    make: Any, shape: tuple[int, ...], teaches: Callable[[Exception], None]
) -> None:
    """As in a language model of 16 positions trained with batches of 8 or 16; expanded, they are the batch."""
    length = shape[-1]
    table, head = nn.Embedding(length, WIDTH, dtype=DOUBLE), nn.Linear(WIDTH, CLASSES, dtype=DOUBLE)

    def run(net: Net, x: Tensor) -> Tensor:
        positions = torch.arange(length).view(shape)
        return net.head((x + net.table(positions.expand(len(x), -1) if net.expanded else positions)).tanh().mean(1))

    model, x = Net(run, table=table, head=head), torch.randn(8, length, WIDTH, dtype=DOUBLE)
    opt = make(model, embeddings="kronecker")
    model.expanded = False
    with pytest.raises(UnsupportedModelError, match=r"'table\.weight'.*8 samples.*all of them alike") as caught:
        model(x)
    teaches(caught.value)
    opt.close()
    opt = make(model, embeddings="kronecker")
    model.expanded = True
    model(x).square().mean().backward()
    opt.step()


def test_tokens_that_count_up_and_are_the_batch_are_taken() -> None:
    """The samples of a whole data set in their order, each with an embedding of its own."""
    model = nn.Sequential(nn.Embedding(9, WIDTH), nn.Linear(WIDTH, CLASSES))
    opt = st.KFAC(model, embeddings="kronecker")
    F.cross_entropy(model(torch.arange(9)), torch.arange(9) % CLASSES).backward()
    opt.step()
    assert opt.state[model[0].weight]["input_factor"].shape == (9,)


@pytest.mark.parametrize("of_table", [True, False])
@pytest.mark.parametrize("make", [st.KFAC, st.FOP])
def test_a_weight_that_is_table_and_matrix_at_once_is_refused_by_name(
    make: Any, of_table: bool, teaches: Callable[[Exception], None]
) -> None:
    """Tied by a call, which no look at the modules finds; in a square one both factors have the shapes of the other."""
    layer = nn.Embedding(WIDTH, WIDTH) if of_table else nn.Linear(WIDTH, WIDTH, bias=False)
    model = Net(lambda n, x: F.linear(F.embedding(x, n.layer.weight).tanh().mean(1), n.layer.weight), layer=layer)
    opt = make(model, embeddings="kronecker")
    tokens = torch.randint(0, WIDTH, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedModelError, match=r"'layer\.weight'.*table of an embedding") as caught:
        model(tokens)
    teaches(caught.value)
    opt.close()
    opt = make(model, embeddings="kronecker", skip="layer")
    model(tokens).square().mean().backward()
    opt.step()


@pytest.mark.parametrize("make", [st.KFAC, st.FOP])
def test_a_batch_without_tokens_teaches_an_embedding_nothing(make: Any) -> None:
    table, head = nn.Embedding(VOCABULARY, WIDTH, dtype=DOUBLE), nn.Linear(WIDTH, CLASSES, dtype=DOUBLE)
    model = Net(lambda n, x: n.head(n.table(x).tanh().sum(1)), table=table, head=head)
    opt = make(model, lr=0.1, momentum=0.0, embeddings="kronecker", **EVERY)
    for tokens in (batch()[0], torch.zeros(BATCH, 0, dtype=torch.int64)):
        before = table.weight.detach().clone()
        factor = opt.state[table.weight].get("input_factor")
        opt.zero_grad()
        F.cross_entropy(model(tokens), batch()[1]).backward()
        opt.step()
    torch.testing.assert_close(table.weight.detach(), before, rtol=0, atol=0)
    torch.testing.assert_close(opt.state[table.weight]["input_factor"], factor, rtol=0, atol=0)


def test_an_embedding_left_to_adamw_needs_no_word_about_the_loss() -> None:
    """Without layers that have factors nothing depends on how many terms the loss has."""
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH))
    opt = st.KFAC(model)
    before = model[0].weight.detach().clone()
    model(batch()[0]).square().mean().backward()
    opt.step()
    assert not torch.equal(model[0].weight, before)


def test_an_embedding_that_is_frozen_later_stays_and_the_rest_is_trained() -> None:
    model = Words(one_hot=False)
    opt = st.KFAC(model, lr=0.1, embeddings="kronecker")
    for frozen in (False, True):
        model.table.requires_grad_(not frozen)
        before = [p.detach().clone() for p in (model.table.weight, model.head.weight)]
        opt.zero_grad()
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        opt.step()
        assert torch.equal(model.table.weight, before[0]) == frozen
        assert not torch.equal(model.head.weight, before[1])
