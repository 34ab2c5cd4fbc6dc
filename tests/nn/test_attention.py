"""The attention layer: every option written out by hand, masks, sizes, types, and the places where it is put."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as hs
from torch import Tensor, nn
from torch.autograd import gradcheck

import steepest as st
from attending import layer_by_hand
from steepest.errors import InvalidOptionError
from steepest.nn import CholeskyInverse, NewtonInverse, SoftmaxFreeAttention

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "few landmarks": {"num_landmarks": 4},
    "one landmark, plain": {"num_landmarks": 1, "normalize": False, "learn_bandwidth": False, "bias": False},
    "strided": {"landmark_stride": 3},
    "strided, as in the papers": {"landmark_stride": 2, "value_kernel_size": 5, "learn_bandwidth": False},
    "newton": {"num_landmarks": 3, "inverse": NewtonInverse(ridge=0.1)},
    "map": {"dims": 2, "num_landmarks": 4},
    "map, convolved values": {"dims": 2, "num_landmarks": 6, "value_kernel_size": 3, "normalize": False},
    "map, strided": {"dims": 2, "landmark_stride": 2, "value_kernel_size": 3, "inverse": CholeskyInverse(ridge=0.3)},
}
SIZE = (3, 4)
GRIDS = {4: (2, 2), 6: (2, 3)}


def made(name: str, *, dtype: torch.dtype = torch.float64, **options: Any) -> SoftmaxFreeAttention:
    """A layer of six features in two heads, none of its parameters at a special value."""
    torch.manual_seed(1)
    layer = SoftmaxFreeAttention(6, 2, dtype=dtype, **OPTIONS[name] | options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sizes(layer: SoftmaxFreeAttention) -> dict[str, Any]:
    return {"size": SIZE} if layer.dims == 2 else {}


def grid(layer: SoftmaxFreeAttention) -> dict[str, Any]:
    averaged = layer.dims == 2 and layer.landmark_stride is None
    return sizes(layer) | ({"grid": GRIDS[layer.num_landmarks or 0]} if averaged else {})


def mask_of(*rows: str) -> Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def gradients(layer: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(layer.parameters())))


# What it computes


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_what_is_written_out_by_hand(name: str) -> None:
    """Outputs and the gradient of every parameter and of the tokens, with values of their own and without."""
    layer, x, value = made(name), tokens(2, 12, 6).requires_grad_(), tokens(2, 12, 6, seed=1)
    for others in (None, value):
        out, weights = layer(x, value=others, **sizes(layer))
        assert weights is None
        hand = [
            layer_by_hand(layer, x[b], value=None if others is None else others[b], **grid(layer)) for b in range(2)
        ]
        torch.testing.assert_close(out, torch.stack(hand), rtol=1e-7, atol=1e-8)
        leaves = [x, *layer.parameters()]
        found, exact = (torch.autograd.grad(o.square().sum(), leaves) for o in (out, torch.stack(hand)))
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
        assert all(g.any() for g in found)


@pytest.mark.parametrize("name", OPTIONS)
def test_masked_tokens_count_nowhere_and_may_hold_nan(name: str) -> None:
    """In outputs, in the tokens' gradients, in every weight's gradient: bit for bit what zeros there give."""
    layer, x, mask = made(name), tokens(3, 12, 6), mask_of("........xxxx", "x..xx......x", "xxxxxxxxxxxx")
    results = []
    for fill in (0.0, torch.nan, torch.inf):
        filled = x.masked_fill(mask.unsqueeze(-1), fill).requires_grad_()
        out = layer(filled, key_padding_mask=mask, **sizes(layer))[0]
        loss = out[~mask].square().sum()
        results.append([out, *torch.autograd.grad(loss, filled, retain_graph=True), *gradients(layer, loss)])
    for a, b, c in zip(*results, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert not results[0][1][mask].any()
    for sample in range(2):
        absent = mask[sample].nonzero().flatten().tolist()
        hand = layer_by_hand(layer, x[sample], absent=absent, **grid(layer))
        torch.testing.assert_close(results[0][0][sample], hand, rtol=1e-7, atol=1e-8)


@settings(max_examples=25)
@given(
    length=hs.integers(1, 20), padding=hs.integers(0, 9), seed=hs.integers(0, 9), name=hs.sampled_from(sorted(OPTIONS))
)
def test_padding_at_the_end_is_as_if_it_were_not_there(length: int, padding: int, seed: int, name: str) -> None:
    layer, x = made(name), tokens(1, length + padding, 6, seed=seed)
    if layer.dims == 2 and layer.landmark_stride is None:
        return  # the cells of a map are those of the whole map
    sized = {"size": (length, 1)} if layer.dims == 2 else {}
    longer = {"size": (length + padding, 1)} if layer.dims == 2 else {}
    mask = torch.arange(length + padding).unsqueeze(0) >= length
    found = layer(x, key_padding_mask=mask, **longer)[0][:, :length]
    torch.testing.assert_close(found, layer(x[:, :length], **sized)[0], rtol=1e-6, atol=1e-7)


def test_averaged_landmarks_leave_out_tokens_anywhere() -> None:
    layer, x, mask = made("few landmarks"), tokens(2, 12, 6), mask_of("..xx..x....x", "x..xxxxx....")
    found = layer(x, key_padding_mask=mask)[0]
    for sample in range(2):
        alone = layer(x[sample][~mask[sample]])[0]
        torch.testing.assert_close(found[sample][~mask[sample]], alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", OPTIONS)
def test_layouts_of_the_batch(name: str) -> None:
    layer, x, value, mask = made(name), tokens(3, 12, 6), tokens(3, 12, 6, seed=1), torch.zeros(3, 12, dtype=torch.bool)
    mask[1, 8:] = True
    other = copy.deepcopy(layer)
    other.batch_first = False
    expected = layer(x, value=value, key_padding_mask=mask, **sizes(layer))[0]
    found = other(x.transpose(0, 1), value=value.transpose(0, 1), key_padding_mask=mask, **sizes(layer))[0]
    torch.testing.assert_close(found.transpose(0, 1), expected, rtol=1e-10, atol=1e-12)
    for one in (layer, other):
        alone = one(x[1], value=value[1], key_padding_mask=mask[1], **sizes(layer))[0]
        torch.testing.assert_close(alone, expected[1], rtol=1e-10, atol=1e-12)
        diagnosed = one.diagnose(x[1], mask[1], **sizes(layer)).condition
        torch.testing.assert_close(diagnosed, layer.diagnose(x, mask, **sizes(layer)).condition[1:2])
    floats = torch.zeros(3, 12).masked_fill(mask, -math.inf)
    assert torch.equal(layer(x, value=value, key_padding_mask=floats, **sizes(layer))[0], expected)
    assert layer(x[:0], **sizes(layer))[0].shape == (0, 12, 6)


@pytest.mark.parametrize("name", OPTIONS)
def test_no_sample_depends_on_the_others_of_its_batch(name: str) -> None:
    layer = made(name, dtype=torch.float32)

    def results(fill: float) -> list[Tensor]:
        x = torch.cat([tokens(1, 12, 6), torch.full((2, 12, 6), fill)]).float().requires_grad_()
        out = layer(x, **sizes(layer))[0]
        return [out[0], torch.autograd.grad(out[0].square().sum(), x)[0][0]]

    for a, b, c in zip(results(0.5), results(-30.0), results(torch.nan), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (5, 7), (7, 3)])
@pytest.mark.parametrize("name", ["map", "map, convolved values", "map, strided"])
def test_every_token_of_a_map_of_odd_size_matters(name: str, size: tuple[int, int]) -> None:
    """Also in what the landmarks are: with the tokens' own place in the kernel left out."""
    layer, x = made(name), tokens(1, math.prod(size), 6).requires_grad_()
    out = layer(x, size=size)[0]
    grads = torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0]
    assert (grads.abs().amax(-1) > 1e-8).all()
    points = layer._landmarks(layer._queries(x, None), None, size)[0]
    grads = torch.autograd.grad((points * tokens(*points.shape, seed=3)).sum(), x)[0]
    assert (grads.abs().amax(-1) > 1e-8).all()


@pytest.mark.parametrize("name", ["few landmarks", "map, strided", "newton"])
def test_gradients(name: str) -> None:
    layer, x, mask = made(name), tokens(2, 12, 6).requires_grad_(), mask_of(".x.........x", "............")
    names = list(dict(layer.named_parameters()))

    def function(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        out = torch.func.functional_call(layer, given, (x,), {"key_padding_mask": mask} | sizes(layer))[0]
        return out[:, ::4, :2]

    assert gradcheck(function, (x, *layer.parameters()), atol=1e-6, fast_mode=True)


def test_dropout_acts_in_training_alone() -> None:
    layer, x = made("few landmarks", dropout=0.5), tokens(2, 12, 6)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], made("few landmarks")(x)[0])


def test_the_bandwidth_of_a_head_widens_its_kernel() -> None:
    """Wide kernels cover all tokens, narrow ones none but those at a landmark."""
    layer, x = made("few landmarks"), tokens(2, 12, 6)
    with torch.no_grad():
        layer.log_bandwidth.copy_(torch.tensor([4.0, -4.0]))
    coverage = layer.diagnose(x).coverage
    assert (coverage[:, 0] > 0.99).all()
    assert (coverage[:, 1] < 0.1).all()


# Types, copies, transforms, the compiler


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_half_precision_by_autocast_and_throughout(name: str, dtype: torch.dtype) -> None:
    layer, x = made(name, dtype=torch.float32), tokens(2, 12, 6).float() / 2
    mask = mask_of("............", ".........xxx")
    exact = layer(x, key_padding_mask=mask, **sizes(layer))[0].detach()
    near = 1e-2 * exact.abs().max().item()
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x, key_padding_mask=mask, **sizes(layer))[0]
    narrow = copy.deepcopy(layer).to(dtype)
    for model, found in ((layer, out), (narrow, narrow(x.to(dtype), key_padding_mask=mask, **sizes(layer))[0])):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), exact, rtol=0, atol=near)
        grads = gradients(model, found.float().square().sum())
        assert all(
            g.isfinite().all() and g.any() and g.dtype == p.dtype
            for g, p in zip(grads, model.parameters(), strict=True)
        )


def test_the_kernel_under_autocast_is_computed_in_float32() -> None:
    """Tokens so far from the origin that squares in half precision tell nothing: the island must hold."""
    layer, x = made("few landmarks", dtype=torch.float32), tokens(2, 12, 6).float()
    with torch.no_grad():
        layer.q_proj.bias += 30
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)[0]
        queries, values = layer.q_proj(x), layer.v_proj(x)
        heads = layer._split(queries) * (layer.log_bandwidth.neg().exp() * 3**-0.25).view(-1, 1, 1)
    wide = st.nn.functional.softmax_free_attention(heads.float(), layer._split(values).float(), 4, scale=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer.out_proj(wide.bfloat16().transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", OPTIONS)
def test_copies_and_states_and_pickles_are_the_same_layer(name: str) -> None:
    layer, x = made(name), tokens(2, 12, 6)
    expected = layer(x, **sizes(layer))[0]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = SoftmaxFreeAttention(6, 2, dtype=torch.float64, **OPTIONS[name])
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, **sizes(layer))[0], expected)
        assert repr(other) == repr(layer)
    assert SoftmaxFreeAttention(6, 2, device="meta", **OPTIONS[name])(x.float().to("meta"), **sizes(layer))[0].is_meta


@pytest.mark.parametrize("name", OPTIONS)
def test_torch_func_gives_gradients_sample_by_sample(name: str) -> None:
    layer, x, mask = made(name), tokens(2, 12, 6), mask_of("............", ".........xxx")
    values = {key: p.detach() for key, p in layer.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        options = {"key_padding_mask": mask} | sizes(layer)
        return torch.func.functional_call(layer, values, (x,), options)[0].square().sum()

    for form in (mask, torch.zeros(2, 12).masked_fill(mask, -math.inf)):
        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(values, x, form)
        for sample in range(2):
            out = layer(x[sample], key_padding_mask=mask[sample], **sizes(layer))[0]
            for a, b in zip(found.values(), gradients(layer, out.square().sum()), strict=True):
                torch.testing.assert_close(a[sample], b, rtol=1e-8, atol=1e-9)
    jacobian = torch.func.jacrev(lambda x: layer(x, **sizes(layer))[0].sum(0))(x[0])
    exact = torch.autograd.functional.jacobian(lambda x: layer(x, **sizes(layer))[0].sum(0), x[0])
    torch.testing.assert_close(jacobian, exact, rtol=1e-8, atol=1e-9)


# Dynamo makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "dynamic", "masked"),
    [
        ("few landmarks", True, False),
        ("few landmarks", False, True),
        ("map, strided", False, False),
        ("map, strided", False, True),
        ("newton", False, False),
    ],
)
def test_the_compiler_takes_it_whole(name: str, dynamic: bool, masked: bool) -> None:
    layer, mask = made(name), None
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3) if dynamic else (3,):
        x = tokens(batch, 12, 6).requires_grad_()
        if masked:
            mask = mask_of("............", ".........xxx", "xxxxxxxxxxxx")
        results = []
        for model in (layer, compiled):
            out = model(x, key_padding_mask=mask, **sizes(layer))[0]
            results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-10)
    torch._dynamo.reset()


def test_it_takes_the_place_of_self_attention_in_torch_encoders() -> None:
    """In training and in evaluation, where torch would bypass an attention of its own, with and without gradients."""
    for batch_first in (True, False):
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=batch_first, dtype=torch.float64)
        block.self_attn = made("few landmarks", batch_first=batch_first)
        model = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        x, mask = tokens(2, 12, 6), mask_of("............", ".........xxx")
        laid = x if batch_first else x.transpose(0, 1)
        found = []
        for mode in (True, False):
            model.train(mode)
            found.append(model(laid, src_key_padding_mask=mask))
            with torch.no_grad():
                found.append(model(laid, src_key_padding_mask=mask))
        found = [out if batch_first else out.transpose(0, 1) for out in found]
        for out in found[1:]:
            torch.testing.assert_close(out[~mask], found[0][~mask], rtol=1e-9, atol=1e-10)
        alone = x[1:, :9] if batch_first else x[1:, :9].transpose(0, 1)
        torch.testing.assert_close(model(alone).flatten(0, 1), found[0][1, :9], rtol=1e-9, atol=1e-10)


# What cannot be


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"is_causal": True}, "cannot be causal"),
        ({"attn_mask": torch.zeros(12, 12)}, "attn_mask is for pairs of tokens.*key_padding_mask"),
        ({"need_weights": True}, r"need_weights=True.*Pass need_weights=False; diagnose\(\)"),
        ({"key": torch.ones(2, 12, 6)}, "key is another tensor.*use torch.nn.MultiheadAttention"),
        ({"query": torch.ones(12)}, r"query has the shape \(12,\).*give both as \[B, n, 6\] or \[n, 6\]"),
        ({"query": torch.ones(2, 3, 12, 6)}, r"query has the shape \(2, 3, 12, 6\)"),
        ({"query": torch.ones(2, 12, 5)}, r"query has the shape \(2, 12, 5\)"),
        ({"query": torch.ones(2, 0, 6)}, "with a token at least"),
        ({"value": torch.ones(2, 11, 6)}, r"and value \(2, 11, 6\): give both"),
        ({"value": torch.ones(12, 6)}, r"and value \(12, 6\): give both"),
        ({"size": (3, 4)}, r"size=\(3, 4\) for attention over 1 dimension\(s\): build it with dims=2"),
        (
            {"key_padding_mask": torch.zeros(2, 11, dtype=torch.bool)},
            r"shape \(2, 11\): give one entry per token, \(2, 12\)",
        ),
        ({"key_padding_mask": torch.zeros(2, 12, dtype=torch.int)}, "key_padding_mask is torch.int32: give booleans"),
        ({"key_padding_mask": torch.ones(2, 12)}, "numbers other than 0 and -inf: give booleans"),
    ],
)
def test_calls_that_cannot_be_honoured_are_told(changed: dict[str, Any], message: str, teaches: Any) -> None:
    layer = SoftmaxFreeAttention(6, 2)
    with pytest.raises(InvalidOptionError, match=message) as caught:
        layer(**{"query": torch.ones(2, 12, 6)} | changed)
    teaches(caught.value)
    if "query" in changed:
        with pytest.raises(InvalidOptionError, match=message):
            layer.diagnose(changed["query"])


def test_shapes_are_told_as_they_were_given() -> None:
    layer = SoftmaxFreeAttention(6, 2, batch_first=False)
    with pytest.raises(InvalidOptionError, match=r"query has the shape \(12, 2, 5\) .* give both as \[n, B, 6\]"):
        layer(torch.ones(12, 2, 5))


@pytest.mark.parametrize("size", [None, (3, 5), (-3, -4), (12,), (2, 2, 3)])
@pytest.mark.parametrize("options", [{}, {"landmark_stride": 2}, {"value_kernel_size": 3}])
def test_a_size_that_is_not_that_of_the_map_is_told(options: dict[str, int], size: Any) -> None:
    layer = SoftmaxFreeAttention(6, 2, dims=2, **options)
    for call in (layer, layer.diagnose):
        with pytest.raises(InvalidOptionError, match=r"pass size=|give the height and width"):
            call(torch.ones(2, 12, 6), size=size)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 1), {}, "embed_dim=0: give an integer of at least 1"),
        ((6, 0), {}, "num_heads=0: give an integer"),
        ((6, 4), {}, "num_heads=4 does not divide embed_dim=6"),
        ((6, 2), {"num_landmarks": 4, "landmark_stride": 2}, "exclude each other: give one"),
        ((6, 2), {"num_landmarks": 0}, "num_landmarks=0: give"),
        ((6, 2), {"landmark_stride": 0}, "landmark_stride=0: give"),
        ((6, 2), {"dims": 3}, "dims=3: give 1 for sequences or 2 for maps"),
        ((6, 2), {"value_kernel_size": 4}, "value_kernel_size=4: give an odd number"),
        ((6, 2), {"value_kernel_size": -1}, "value_kernel_size=-1: give an integer"),
        ((6, 2), {"dropout": 1.0}, "dropout=1.0: give a finite number"),
    ],
)
def test_options_that_make_no_layer_are_told(
    arguments: tuple[int, int], options: dict[str, Any], message: str, teaches: Any
) -> None:
    with pytest.raises(InvalidOptionError, match=message) as caught:
        SoftmaxFreeAttention(*arguments, **options)
    teaches(caught.value)
