"""Rows in an order or layout that may be misread: the exact answer or a refusal, never another number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from capturing import exact_or_refused
from zoo import Net
from zoo_parts import after, between, param, rows_of, two_layers

L = nn.Linear


def plain(n: Net, x: Tensor) -> Tensor:
    return rows_of(n(x))


def position_first(n: Net, x: Tensor) -> Tensor:
    flat = x.transpose(0, 1).reshape(-1, 5)
    return rows_of(n(flat).view(x.shape[1], x.shape[0], 3).transpose(0, 1))


def sample_in_the_middle(n: Net, x: Tensor) -> Tensor:
    """[positions, samples, more positions, features]."""
    return rows_of(n(x.unflatten(1, (2, -1)).transpose(0, 1)).transpose(0, 1))


def chosen_position(n: Net, x: Tensor) -> Tensor:
    """Sample i is read at position i: both leading axes carry the rows."""
    return rows_of(n(x).diagonal(dim1=0, dim2=1).T)


def latent_through_layer(n: Net, x: Tensor) -> Tensor:
    return rows_of(n(x) + n.a(n.latent)[:3].tanh().sum())


def mask_token(n: Net, x: Tensor) -> Tensor:
    return rows_of(n.b(n.a(torch.where(x[..., :1] > 0, x, n.token)).tanh()))


def ragged(n: Net, x: Tensor) -> Tensor:
    """Sample i owns i + 1 rows of the flat batch: no regular layout holds."""
    parts = n(torch.cat([s[: i + 1] for i, s in enumerate(x)])).split([i + 1 for i in range(len(x))])
    return torch.stack([rows_of(p.sum(0, keepdim=True))[0] for p in parts])


def sample_by_sample(n: Net, x: Tensor) -> Tensor:
    return torch.cat([rows_of(n(s.unsqueeze(0))) for s in x])


def two_halves(n: Net, x: Tensor) -> Tensor:
    return torch.cat([rows_of(n(half)) for half in x.chunk(2)])


def unbatched(n: Net, x: Tensor) -> Tensor:
    return torch.stack([torch.tanh(n(s)).sum() for s in x])


def points_made_inside(n: Net, x: Tensor) -> Tensor:
    """Collocation points: constants, but one for each sample."""
    points = torch.linspace(0, 1, len(x), dtype=x.dtype)[:, None]
    return rows_of(n(points * torch.arange(1, 6)))


def latent_queries(n: Net, x: Tensor) -> Tensor:
    return n.attn(n.latent.expand(len(x), -1, -1), x, x, need_weights=False)[0]


def edited_scale(n: Net, x: Tensor) -> Tensor:
    s = n.s * 1
    h = x + s
    s.mul_(2)
    return h + s


def cleared_row(n: Net, x: Tensor) -> Tensor:
    w = n.w * 1
    w[0] = 0
    return F.linear(x, w)


def parameter_rows(n: Net, x: Tensor) -> Tensor:
    """The batch axis meets a parameter of the same length: sample i owns scale[i]."""
    return rows_of(n(x)) * n.scale


wide = (6, 5)
tall = (4, 4, 5)
CASES: dict[str, tuple[Callable[[], Net], Callable[[Net, Tensor], Tensor], tuple[int, ...]]] = {
    "losses_flipped": (two_layers, after(lambda r: r.flip(0)), wide),
    "losses_sorted": (two_layers, after(lambda r: r.sort().values), wide),
    "losses_of_first_half": (two_layers, after(lambda r: r[:3]), wide),
    "losses_of_last_half": (two_layers, after(lambda r: r[3:]), wide),
    "losses_strided": (two_layers, after(lambda r: r[::2]), wide),
    "losses_masked": (two_layers, after(lambda r: r[torch.tensor([0, 2, 3])]), wide),
    "losses_repeated": (two_layers, after(lambda r: torch.cat([r, r])), wide),
    "losses_interleaved": (two_layers, after(lambda r: r.repeat_interleave(2)), wide),
    "one_row_zero": (two_layers, after(lambda r: r * torch.tensor([1, 0, 1, 1, 1, 1.0])), wide),
    "only_one_row_alive": (two_layers, after(lambda r: r * torch.tensor([0, 0, 0, 1, 0, 0.0])), wide),
    "micro_batched_apart": (two_layers, after(lambda r: r.view(2, 3).mean(0)), wide),
    "samples_flipped_inside": (two_layers, between(lambda h: h.flip(0)), wide),
    "samples_flipped_and_back": (two_layers, lambda n, x: rows_of(n.b(n.a(x).flip(0).tanh()).flip(0)), wide),
    "samples_rolled_inside": (two_layers, between(lambda h: h.roll(1, 0)), wide),
    "position_first": (two_layers, position_first, (4, 3, 5)),
    "position_first_square": (two_layers, position_first, tall),
    "position_first_4d": (two_layers, sample_in_the_middle, (3, 4, 5)),
    "sample_in_the_middle_square": (two_layers, sample_in_the_middle, (2, 4, 5)),
    "axes_swapped_square": (two_layers, lambda n, x: rows_of(n.b(n.a(x).tanh().transpose(0, 1))), tall),
    "chosen_position": (two_layers, chosen_position, tall),
    "last_position": (two_layers, lambda n, x: rows_of(n(x)[:, -1]), tall),
    "ragged": (two_layers, ragged, tall),
    "sample_by_sample": (two_layers, sample_by_sample, wide),
    "two_halves": (two_layers, two_halves, wide),
    "unbatched": (two_layers, unbatched, wide),
    "parameter_rows": (lambda: Net(lambda n, x: n.a(x), a=L(5, 4), scale=param(6)), parameter_rows, wide),
    "latent_through_layer": (
        lambda: Net(lambda n, x: n.b(n.a(x).tanh()), a=L(5, 4), b=L(4, 3), latent=param(3, 5)),
        latent_through_layer,
        wide,
    ),
    "mask_token": (lambda: Net(lambda n, x: x, a=L(5, 4), b=L(4, 3), token=param(5)), mask_token, tall),
    "prelu": (
        lambda: Net(lambda n, x: n.p(n.a(x)), a=L(5, 4), p=nn.PReLU(4)),
        plain,
        wide,
    ),
    "addmm": (
        lambda: Net(lambda n, x: torch.addmm(n.b, x, n.w), w=param(5, 4), b=param(4)),
        plain,
        wide,
    ),
    "weight_on_the_left": (
        lambda: Net(lambda n, x: (n.w @ x.T).T, w=param(4, 5)),
        plain,
        wide,
    ),
    "weight_on_the_left_square": (
        lambda: Net(lambda n, x: n.w @ x, w=param(4, 4)),
        plain,
        tall,
    ),
    "batched_weight": (lambda: Net(lambda n, x: x @ n.w, w=param(4, 5, 3)), plain, tall),
    "hypernetwork": (
        lambda: Net(lambda n, x: torch.bmm(n.a(x).view(-1, 2, 2), n.b(x).unsqueeze(2)), a=L(5, 4), b=L(5, 2)),
        plain,
        wide,
    ),
    "functional_conv_weight": (
        lambda: Net(lambda n, x: F.conv1d(x, n.k.flip(-1), padding=1), k=param(3, 4, 3)),
        plain,
        tall,
    ),
    "stacked_parameters": (
        lambda: Net(lambda n, x: F.linear(x, torch.stack([n.u, n.v])), u=param(5), v=param(5)),
        plain,
        wide,
    ),
    "low_rank_sum": (
        lambda: Net(lambda n, x: F.linear(x, n.a.weight + n.u @ n.v), a=L(5, 4), u=param(4, 2), v=param(2, 5)),
        plain,
        wide,
    ),
    "negative_and_reversed": (
        lambda: Net(lambda n, x: 1 - n.s * (2 - x) / (1 + n.s**2), s=param(5)),
        plain,
        wide,
    ),
    "setitem": (
        lambda: Net(lambda n, x: _set_first(n.a(x).tanh(), n.first), a=L(5, 4), first=param(4)),
        plain,
        tall,
    ),
    "assigned_out": (
        lambda: Net(lambda n, x: torch.add(x, n.s, out=None) * 2, s=param(5)),
        plain,
        wide,
    ),
    "parameter_list_sum": (
        lambda: Net(lambda n, x: n.a(x) + sum(n.all), a=L(5, 4), all=nn.ParameterList([param(4), param(4)])),
        plain,
        wide,
    ),
    "mask_is_no_buffer": (
        lambda: Net(lambda n, x: F.linear(x, n.w * torch.ones(4, 4).tril().to(x), n.b), w=param(4, 4), b=param(4)),
        plain,
        (4, 4),
    ),
    "derived_edited_between_uses": (lambda: Net(edited_scale, s=param(5)), plain, wide),
    "derived_row_cleared": (lambda: Net(cleared_row, w=param(4, 5)), plain, wide),
    "tensor_constant": (lambda: Net(lambda n, x: x * (torch.tensor(2.0) * n.s), s=param(6)), plain, (6, 6)),
    "repeated_parameter": (
        lambda: Net(lambda n, x: torch.cat([n.s.repeat(len(x), 1), x], 1), s=param(1, 5)),
        plain,
        wide,
    ),
    "data_made_inside": (two_layers, points_made_inside, wide),
    "data_in_a_buffer": (
        lambda: Net(lambda n, x: n.a(n.points), a=L(5, 4), points=torch.randn(6, 5)),
        plain,
        wide,
    ),
    "buffer_overwritten_by_data": (
        lambda: Net(lambda n, x: n.a(n.cache.copy_(x) * n.s), a=L(5, 4), s=param(5), cache=torch.zeros(6, 5)),
        plain,
        wide,
    ),
    "latent_queries": (
        lambda: Net(latent_queries, attn=nn.MultiheadAttention(6, 2, batch_first=True), latent=param(1, 2, 6)),
        plain,
        (4, 3, 6),
    ),
    "threshold": (lambda: Net(lambda n, x: n.a(x) * (x[:, :4] > n.cut), a=L(5, 4), cut=param(4)), plain, wide),
    "number_from_parameter": (lambda: Net(lambda n, x: n.a(x) * n.s.item() + n.s, a=L(5, 4), s=param()), plain, wide),
    "orthogonal": (
        lambda: nn.Sequential(parametrizations.orthogonal(L(5, 5), orthogonal_map="matrix_exp"), nn.Tanh(), L(5, 2)),
        plain,
        wide,
    ),
    "data_mask_of_weight": (lambda: Net(lambda n, x: F.linear(x, n.w * x[0].sign()), w=param(4, 5)), plain, wide),
    "parameter_index_by_sample": (
        lambda: Net(lambda n, x: x * n.s[torch.arange(len(x)) % 2][:, None], s=param(2)),
        plain,
        wide,
    ),
    "unfolded": (
        lambda: Net(lambda n, x: torch.matmul(x.unfold(1, 2, 1), n.w), w=param(2, 3)),
        plain,
        wide,
    ),
}


def _set_first(h: Tensor, value: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] = value
    return h


@pytest.mark.parametrize("name", CASES)
def test_exact_or_refused(name: str) -> None:
    factory, losses, shape = CASES[name]
    model = factory().double()
    x = torch.randn(shape, dtype=torch.float64)
    exact_or_refused(model, model, lambda: losses(model, x))


UNBATCHED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: L(5, 4), (5,)),
    "linear_sequence": (lambda: L(5, 4), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 3, 2), (4, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 2, groups=1), (2, 4, 5)),
    "conv2d_one_channel": (lambda: nn.Conv2d(1, 1, 2), (1, 4, 5)),
    "layer_norm": (lambda: nn.Sequential(nn.LayerNorm(5), nn.Tanh()), (5,)),
    "instance_norm": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 6)),
    "attention": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), (3, 6)),
    "scale": (lambda: Net(lambda n, x: x * n.s, s=param(5)), (5,)),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_one_sample_without_a_batch_axis(name: str) -> None:
    factory, shape = UNBATCHED[name]
    model, x = factory().double(), torch.randn(shape, dtype=torch.float64)
    exact_or_refused(model, model, lambda: torch.tanh(model(x) - 0.2).square().sum().view(1))


def test_a_table_indexed_by_the_data_is_an_embedding() -> None:
    """Also with indices that count from the end."""

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.table[tokens]

    model, tokens = Lookup(), torch.tensor([[0, 1], [4, -1], [-5, 2]])
    assert not exact_or_refused(model, model, lambda: rows_of(model(tokens)))
