"""What the entries of the zoo are made of: an Entry, odd forwards, losses and batches.

In every batch the samples lie on axis 0 of every tensor, so an oracle can take one sample alone; a model that
wants another layout (sequence first) transposes inside. Weights, norms and statistics are all away from their
neutral starting values: an ignored affine part or a wrong statistic shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, ...]
Rows = Tensor | dict[str, Tensor]


class Net(nn.Module):
    """Members by keyword, forward by a function: the shortest way to write an odd model."""

    def __init__(self, run: Callable[..., Tensor], **members: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


def residual(block: nn.Module) -> nn.Module:
    return Net(lambda n, x: x + n.block(x), block=block)


def rows_of(outputs: Tensor) -> Tensor:
    """One smooth number per sample, with no symmetry that a normalisation could cancel."""
    flat = outputs.flatten(1)
    ramp = torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype)
    return (ramp * torch.tanh(flat - 0.2)).sum(1)


def plain_losses(model: nn.Module, batch: Batch) -> Rows:
    return rows_of(model(*batch))


@dataclass(frozen=True)
class Entry:
    """A model that the engine must differentiate exactly.

    Attributes:
        name: The test's id.
        factory: Builds the model in float32.
        batch: Builds the inputs from a floating dtype and a seed.
        losses: The rows, (B,) or named blocks of them, of a model on a batch.
        expect: "exact", or "safe" where a refusal by name is as good as the exact answer.
        one_by_one: Whether each row can be computed from its sample alone under vmap.
    """

    name: str
    factory: Callable[[], nn.Module]
    batch: Callable[[torch.dtype, int], Batch]
    losses: Callable[[nn.Module, Batch], Rows] = plain_losses
    expect: Literal["exact", "safe"] = "exact"
    one_by_one: bool = True

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Batch]:
        """The model with generic weights and a batch; the global generator is left alone."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = self.factory()
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_()
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 2.0)
        return model.to(dtype), self.batch(dtype, seed + 1)

    def closure(self, model: nn.Module, batch: Batch) -> Callable[[], Rows]:
        return lambda: self.losses(model, batch)


def floats(*shapes: tuple[int, ...]) -> Callable[[torch.dtype, int], Batch]:
    """Normal inputs of the given shapes, batch axis included."""

    def make(dtype: torch.dtype, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)

    return make


def tokens(*shape: int, vocab: int = 7) -> Callable[[torch.dtype, int], Batch]:
    """Integer inputs; a vocabulary smaller than the sequence repeats tokens inside a sample."""
    return lambda _, seed: (torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed)),)


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def two_layers() -> Net:
    return Net(lambda n, x: n.b(n.a(x).tanh()), a=nn.Linear(5, 4), b=nn.Linear(4, 3))


def between(change: Callable[[Tensor], Tensor]) -> Callable[[Net, Tensor], Tensor]:
    """A change of the batch between two layers."""
    return lambda n, x: rows_of(n.b(change(n.a(x).tanh())))


def after(change: Callable[[Tensor], Tensor]) -> Callable[[Net, Tensor], Tensor]:
    """A change of the losses."""
    return lambda n, x: change(rows_of(n(x)))


class GPT(nn.Module):
    """Two pre-norm causal blocks; positions from an embedding of arange or a bare parameter."""

    def __init__(self, length: int, *, bare: bool = False, tied: bool = False, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.pos: nn.Parameter | nn.Embedding = param(length, width) if bare else nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "ln1": nn.LayerNorm(width),
                "qkv": nn.Linear(width, 3 * width),
                "out": nn.Linear(width, width, bias=False),
                "ln2": nn.LayerNorm(width),
                "mlp": nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width)),
            })
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if isinstance(self.pos, nn.Embedding):
            h = self.embed(tokens) + self.pos(torch.arange(length))
        else:
            h = self.embed(tokens) + self.pos[:length]
        for block in self.blocks:
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in block["qkv"](block["ln1"](h)).chunk(3, -1))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + block["out"](mixed.transpose(1, 2).flatten(2))
            h = h + block["mlp"](block["ln2"](h))
        return self.head(self.norm(h))


def next_token_losses(model: nn.Module, batch: Batch) -> Tensor:
    (text,) = batch
    logits = model(text)[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none").mean(1)


def dropout_losses(model: nn.Module, batch: Batch) -> Tensor:
    torch.manual_seed(3)  # the mask belongs to the closure, so that an oracle can draw it again
    return plain_losses(model, batch)


def regularised_losses(model: nn.Module, batch: Batch) -> Tensor:
    return plain_losses(model, batch) + 0.1 * sum(p.square().sum() for p in model.parameters())


def uncertainty_losses(model: Net, batch: Batch) -> Tensor:
    return plain_losses(model, batch) * torch.exp(-model.log_var) + model.log_var


def weighted_losses(model: nn.Module, batch: Batch) -> Tensor:
    losses = plain_losses(model, batch)
    return losses * torch.softmax(losses.detach(), 0)


def two_blocks(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    inside, edge = batch
    return {"inside": rows_of(model(inside)), "edge": model(edge).square().sum(1)}


def fresh_mul(net: Net, x: Tensor) -> Tensor:
    h = net.fc(x) + 0
    h.mul_(net.scale)
    return h


def edit_output(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    h[:, 0] = 0
    h *= 2
    h.relu_()
    return net.last(h)


def inplace_residual(net: Net, x: Tensor) -> Tensor:
    x = x.clone() * 1.0
    x += net.block(x.tanh())
    return net.last(x)


def recurrent(net: Net, x: Tensor) -> Tensor:
    h = net.start.expand(x.shape[0], -1)
    for t in range(x.shape[1]):
        h = torch.tanh(net.cell(torch.cat([x[:, t], h], 1)))
    return h


def sequence_first(net: Net, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    return net.last(net.attn(x, x, x, need_weights=False)[0]).transpose(0, 1)


def cross_attention(net: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return net.attn(q, k, v, need_weights=False)[0]


def self_attention(net: Net, x: Tensor) -> Tensor:
    return net.attn(x, x, x, need_weights=False)[0]


def frames(net: Net, x: Tensor) -> Tensor:
    h = net.conv(x.flatten(0, 1)).relu().mean((2, 3))
    return net.last(h.unflatten(0, x.shape[:2]).mean(1))
