"""About ninety tiny models that break naive per-sample hooks, each with a batch and unreduced losses.

Where an axis could be mistaken for the batch, its length equals the batch's: a mix-up is then a wrong
number and not a shape error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from zoo_parts import (
    GPT,
    Batch,
    Entry,
    Net,
    Rows,
    cross_attention,
    dropout_losses,
    edit_output,
    floats,
    frames,
    fresh_mul,
    inplace_residual,
    next_token_losses,
    param,
    recurrent,
    regularised_losses,
    self_attention,
    sequence_first,
    tokens,
    two_blocks,
    uncertainty_losses,
    weighted_losses,
)

__all__ = ["ZOO", "Batch", "Entry", "Net", "Rows"]

L, S = nn.Linear, nn.Sequential
image, wide = floats((3, 4, 6, 5)), floats((4, 5))
series, sequence = floats((4, 4, 9)), floats((4, 4, 6))


def frozen() -> nn.Module:
    model = S(L(5, 6), nn.Tanh(), L(6, 6), nn.Tanh(), L(6, 2))
    model[2].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model


def _linear() -> list[Entry]:
    return [
        Entry("one_layer", lambda: L(5, 3), wide),
        Entry("mlp", lambda: S(L(5, 7), nn.Tanh(), L(7, 6), nn.GELU(), L(6, 3)), wide),
        Entry("linear_no_bias", lambda: S(L(5, 6, bias=False), nn.Tanh(), L(6, 2, bias=False)), wide),
        Entry("linear_3d", lambda: S(L(5, 6), nn.Tanh(), L(6, 2)), floats((4, 3, 5))),
        Entry("linear_3d_long", lambda: S(L(3, 2), nn.Tanh(), L(2, 2)), floats((3, 20, 3))),
        Entry("linear_4d", lambda: S(L(5, 6), nn.Tanh(), L(6, 2)), floats((3, 2, 4, 5))),
        Entry("inplace_relu_linear", lambda: S(L(5, 8), nn.ReLU(inplace=True), L(8, 3)), wide),
        Entry("edited_output", lambda: Net(edit_output, first=L(5, 6), last=L(6, 2)), wide),
        Entry("inplace_residual", lambda: Net(inplace_residual, block=L(5, 5), last=L(5, 2)), wide),
        Entry("residual", lambda: Net(lambda n, x: x + n.b(x + n.a(x).tanh()), a=L(5, 5), b=L(5, 5)), wide),
        Entry("frozen", frozen, wide),
        Entry("unused", lambda: Net(lambda n, x: n.used(x), spare=L(5, 2), used=L(5, 3), scale=param(4)), wide),
        Entry("called_twice", lambda: Net(lambda n, x: n.fc(n.fc(x).tanh()), fc=L(5, 5)), wide),
        Entry(
            "called_twice_3d",
            lambda: Net(lambda n, x: n.fc(n.norm(n.fc(n.norm(x)).tanh())), fc=L(6, 6), norm=nn.LayerNorm(6)),
            sequence,
        ),
        Entry("two_batch_sizes", lambda: Net(lambda n, x: n.fc(x).mean(1) + n.fc(x[:, 0]), fc=L(6, 3)), sequence),
        Entry(
            "flattened",
            lambda: Net(lambda n, x: n.b(n.a(x.reshape(-1, 6)).tanh()).view(*x.shape[:2], 2), a=L(6, 5), b=L(5, 2)),
            floats((3, 4, 6)),
        ),
        Entry("recurrent", lambda: Net(recurrent, start=param(3), cell=L(9, 3)), sequence),
        Entry("dropout", lambda: S(L(5, 8), nn.Dropout(0.4), L(8, 3)), wide, dropout_losses, one_by_one=False),
        Entry(
            "checkpointed",
            lambda: Net(
                lambda n, x: n.last(checkpoint(n.block, n.first(x), use_reentrant=False)),
                first=L(5, 6),
                block=S(L(6, 6), nn.Tanh(), L(6, 6)),
                last=L(6, 2),
            ),
            wide,
            one_by_one=False,
        ),
        Entry(
            "data_statistics",  # the batch is mixed before any parameter: the rows' gradients are not
            lambda: Net(lambda n, x: n.b(n.a(x - x.mean(0)).tanh()), a=L(5, 4), b=L(4, 2)),
            wide,
            one_by_one=False,
        ),
        Entry(
            "detached_weights",
            lambda: S(L(5, 4), nn.Tanh(), L(4, 2)),
            wide,
            weighted_losses,
            one_by_one=False,
        ),
        Entry(
            "two_blocks",
            lambda: S(L(5, 6), nn.Tanh(), L(6, 3)),
            floats((4, 5), (3, 5)),
            two_blocks,
            one_by_one=False,
        ),
    ]


def conv_twice() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    return S(conv, nn.Tanh(), conv)


def padded(mode: str) -> Callable[[], nn.Module]:
    return lambda: S(nn.Conv2d(4, 3, 3, padding=(2, 1), padding_mode=mode), nn.Tanh())


def _conv() -> list[Entry]:
    entries = {
        "conv1d": (
            lambda: S(nn.Conv1d(4, 5, 3, stride=2, dilation=2, padding=1), nn.Tanh(), nn.Conv1d(5, 2, 1)),
            series,
        ),
        "conv2d": (
            lambda: S(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(1, 0), groups=2)),
            image,
        ),
        "conv3d": (
            lambda: S(nn.Conv3d(2, 4, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), groups=2), nn.Tanh()),
            floats((3, 2, 3, 5, 4)),
        ),
        "conv_depthwise": (
            lambda: S(nn.Conv2d(4, 8, 3, groups=4), nn.Tanh(), nn.Conv2d(8, 2, 1, bias=False)),
            image,
        ),
        "conv_same": (lambda: S(nn.Conv2d(4, 3, 3, padding="same", dilation=2)), image),
        "conv_same_even": (lambda: S(nn.Conv2d(4, 3, (2, 4), padding="same"), nn.Tanh()), image),
        "conv_same_even_1d": (lambda: S(nn.Conv1d(4, 3, 4, padding="same", dilation=3)), series),
        "conv_same_even_circular": (
            lambda: S(nn.Conv2d(4, 2, (2, 4), padding="same", padding_mode="circular")),
            image,
        ),
        "conv_valid": (lambda: S(nn.Conv2d(4, 3, 2, padding="valid")), image),
        "conv_leftover": (lambda: S(nn.Conv2d(4, 3, 2, stride=3)), image),
        "conv_inplace_relu": (
            lambda: S(nn.Conv2d(4, 5, 3), nn.ReLU(inplace=True), nn.Conv2d(5, 2, 2)),
            image,
        ),
        "conv_frames": (
            lambda: Net(frames, conv=nn.Conv2d(2, 3, 3), last=L(3, 2)),
            floats((3, 4, 2, 5, 5)),
        ),
        "conv_twice": (conv_twice, image),
        "patches": (lambda: S(nn.Conv2d(4, 3, 2, stride=2), nn.Flatten(2), nn.LayerNorm(6), L(6, 2)), image),
        **{f"conv_{mode}": (padded(mode), image) for mode in ("reflect", "circular", "replicate")},
    }
    return [Entry(name, factory, batch) for name, (factory, batch) in entries.items()]


def _norm() -> list[Entry]:
    entries = {
        "layer_norm": (lambda: S(L(5, 6), nn.LayerNorm(6), nn.Tanh(), L(6, 2)), wide),
        "layer_norm_plain": (lambda: S(L(5, 6), nn.LayerNorm(6, elementwise_affine=False), L(6, 2)), wide),
        "layer_norm_no_bias": (lambda: S(nn.LayerNorm(6, bias=False), L(6, 2)), sequence),
        "layer_norm_2d": (lambda: S(L(6, 3), nn.LayerNorm((4, 3)), nn.Tanh(), L(3, 2)), sequence),
        "group_norm": (
            lambda: S(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 2)),
            image,
        ),
        "group_norm_flat": (lambda: S(L(5, 6), nn.GroupNorm(2, 6), L(6, 2)), wide),
        "instance_norm_1d": (
            lambda: S(nn.Conv1d(4, 3, 3), nn.InstanceNorm1d(3, affine=True), nn.Tanh()),
            series,
        ),
        "instance_norm_2d": (
            lambda: S(nn.InstanceNorm2d(4, affine=True), nn.Tanh(), nn.Conv2d(4, 2, 3)),
            image,
        ),
        "rms_norm": (lambda: S(L(6, 5), nn.RMSNorm(5), nn.Tanh(), L(5, 2)), sequence),
        "batch_norm_eval_1d": (lambda: S(L(5, 6), nn.BatchNorm1d(6), nn.Tanh(), L(6, 2)).eval(), wide),
        "batch_norm_eval_2d": (lambda: S(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).eval(), image),
    }
    return [Entry(name, factory, batch) for name, (factory, batch) in entries.items()]


def _bare() -> list[Entry]:
    def net(
        name: str, run: Callable[..., Tensor], data: Callable[..., Batch] = wide, **shapes: tuple[int, ...]
    ) -> Entry:
        return Entry(name, lambda: Net(run, fc=L(5, 3), **{k: param(*s) for k, s in shapes.items()}), data)

    tall = floats((4, 4, 5))  # T == B: an axis mix-up is not a shape error
    return [
        net("scalar_scale", lambda n, x: n.fc(x).tanh() * n.s, s=()),
        net("vector_scale_left", lambda n, x: n.s * n.fc(x).tanh(), s=(3,)),
        net("square_scale", lambda n, x: n.fc(n.s * x), tall, s=(4, 5)),
        net("inplace_scale", fresh_mul, scale=(3,)),
        net("exp_log_scale", lambda n, x: n.fc(x) * n.log_scale.exp(), log_scale=(3,)),
        net("temperature", lambda n, x: torch.softmax(n.fc(x) / F.softplus(n.t), -1), t=()),
        net("layer_scale", lambda n, x: n.fc(x * n.g[:, None]), tall, g=(4,)),
        net("bias_only", lambda n, x: n.fc(x - n.shift), shift=(5,)),
        net("outer_product", lambda n, x: n.fc(torch.tanh(x[:, :1] * n.w + n.b)), w=(5,), b=(5,)),
        net("position_1td", lambda n, x: n.fc((x + n.pos).tanh()), tall, pos=(1, 4, 5)),
        net("position_td", lambda n, x: n.fc((x + n.pos).tanh()), tall, pos=(4, 5)),
        net("position_sliced", lambda n, x: n.fc((x + n.pos[:, : x.shape[1]]).tanh()), tall, pos=(1, 7, 5)),
        net(
            "cls_token",
            lambda n, x: n.fc(torch.cat([n.cls.expand(len(x), -1, -1), x], 1)),
            tall,
            cls=(1, 1, 5),
        ),
        net("bare_matmul", lambda n, x: n.fc((x @ n.w + n.b).tanh()), w=(5, 5), b=(5,)),
        net("bare_matmul_3d", lambda n, x: n.fc(torch.matmul(x, n.w).tanh()), tall, w=(5, 5)),
        net("child_weight", lambda n, x: F.linear(n.fc(x), n.fc.weight.t()).tanh()),
        net("stopped_weight", lambda n, x: n.fc(x) + F.linear(x, n.fc.weight.detach()) ** 2),
        Entry(
            "masked_linear",
            lambda: Net(
                lambda n, x: F.linear(x, n.weight * n.mask, n.b).tanh(),
                weight=param(4, 5),
                b=param(4),
                mask=torch.tril(torch.ones(4, 5)),
            ),
            wide,
        ),
        Entry(
            "weight_norm_by_hand",
            lambda: Net(
                lambda n, x: F.linear(x, n.g * n.v / n.v.norm(dim=1, keepdim=True)),
                g=param(3, 1),
                v=param(3, 5),
            ),
            wide,
        ),
        Entry("weight_norm", lambda: S(parametrizations.weight_norm(L(5, 4)), nn.Tanh(), L(4, 2)), wide),
        Entry("spectral_norm", lambda: S(parametrizations.spectral_norm(L(5, 4)), L(4, 2)).eval(), wide, expect="safe"),
        Entry("regularised", lambda: S(L(5, 4), nn.Tanh(), L(4, 2)), wide, regularised_losses),
        Entry(
            "uncertainty",
            lambda: Net(lambda n, x: n.fc(x), fc=L(5, 2), log_var=param()),
            wide,
            uncertainty_losses,
        ),
    ]


def _sequence() -> list[Entry]:
    text, mha = tokens(4, 6), nn.MultiheadAttention
    encoder = {"dim_feedforward": 8, "dropout": 0.0, "batch_first": True}
    long, other = floats((4, 5, 6)), floats((4, 4, 6), (4, 5, 6))
    return [
        Entry("embedding", lambda: S(nn.Embedding(7, 4, padding_idx=2), L(4, 2)), text),
        Entry(
            "embedding_negative_padding",
            lambda: Net(lambda n, t: n.fc(F.embedding(t, n.w, -1)), w=param(7, 4), fc=L(4, 2)),
            text,
        ),
        Entry("embedding_alone", lambda: S(nn.Embedding(3, 4)), tokens(4, 9, vocab=3)),
        Entry(
            "table_lookup",
            lambda: Net(lambda n, t: n.fc(n.table[t]), table=param(7, 4), fc=L(4, 2)),
            text,
            expect="safe",
        ),
        Entry(
            "tied",
            lambda: Net(lambda n, t: F.linear(n.fc(n.emb(t)).tanh(), n.emb.weight), emb=nn.Embedding(7, 4), fc=L(4, 4)),
            text,
            next_token_losses,
        ),
        Entry("mha", lambda: Net(self_attention, attn=mha(6, 2, batch_first=True)), long),
        Entry("mha_square", lambda: Net(self_attention, attn=mha(6, 3, batch_first=True, bias=False)), sequence),
        Entry("mha_sequence_first", lambda: Net(sequence_first, attn=mha(6, 2), last=L(6, 2)), long),
        Entry("mha_sequence_first_square", lambda: Net(sequence_first, attn=mha(6, 2), last=L(6, 2)), sequence),
        Entry(
            "mha_cross",
            lambda: Net(cross_attention, attn=mha(6, 2, kdim=5, vdim=3, batch_first=True)),
            floats((4, 4, 6), (4, 3, 5), (4, 3, 3)),
        ),
        Entry(
            "mha_bias_kv",
            lambda: Net(self_attention, attn=mha(6, 2, add_bias_kv=True, batch_first=True)),
            long,
            expect="safe",
        ),
        Entry("encoder_layer", lambda: nn.TransformerEncoderLayer(6, 2, **encoder), sequence),
        Entry(
            "encoder_layer_pre_norm",
            lambda: nn.TransformerEncoderLayer(6, 2, norm_first=True, **encoder),
            long,
        ),
        Entry("decoder_layer", lambda: nn.TransformerDecoderLayer(6, 2, **encoder), other),
        Entry("gpt", lambda: GPT(5), tokens(4, 5), next_token_losses),
        Entry("gpt_square", lambda: GPT(4, bare=True), tokens(4, 4), next_token_losses),
        Entry("gpt_square_embedded_positions", lambda: GPT(4), tokens(4, 4), next_token_losses),
        Entry("gpt_tied", lambda: GPT(6, tied=True), tokens(4, 5), next_token_losses),
    ]


ZOO: list[Entry] = [*_linear(), *_conv(), *_norm(), *_bare(), *_sequence()]
