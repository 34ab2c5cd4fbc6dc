"""Which of several possible layouts is the right one in an ordinary loop: found from the model's output."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.engine.layout import Layout
from steepest.engine.tape import Use
from steepest.errors import UnsupportedModelError

__all__ = ["settle"]

# Without interaction the right layout has all of the gradient, and a wrong one about half.
_ENOUGH, _APART = 0.75, 0.1


def settle(
    uses: Sequence[Use], possible: Sequence[Sequence[Layout]], output: Any, rows: int
) -> tuple[tuple[Layout, ...], bool]:
    """Choose a layout for every use by the gradients of some samples' outputs: those of a use lie where the samples do.

    Two backward passes from the output to the uses. Batch statistics blur the picture and do not hide it.

    Args:
        uses: The uses in question.
        possible: The layouts that their sizes allow.
        output: What the model returned.
        rows: Number of samples.

    Returns:
        The layouts, and whether they are certain: where all gradients of a use are zero any layout will do for now.

    Raises:
        UnsupportedModelError: If the samples cannot be told apart.
    """
    roots = [tensor for tensor in _tensors(output) if tensor.shape[:1] == (rows,) and tensor.requires_grad]
    if not roots:
        error = _unclear(uses[0], rows, "the model returns no tensor with the batch in dimension 0 to tell it by")
        raise error
    generator = torch.Generator("cpu").manual_seed(rows)
    half = torch.zeros(rows, device="cpu")
    half[torch.randperm(rows, generator=generator, device="cpu")[: rows // 2]] = 1
    edges: list[Any] = [use.edge for use in uses]
    shares = [[torch.zeros((), device=roots[0].device) for _ in options] for options in possible]
    passes = [torch.zeros((), device=roots[0].device) for _ in uses]
    for chosen in (half, 1 - half):
        weights = [_weights(root, chosen, generator) for root in roots]
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            roots, edges, weights, retain_graph=True, allow_unused=True
        )
        for i, (use, grad) in enumerate(zip(uses, grads, strict=True)):
            if grad is None or grad.numel() == 0:
                continue
            energy = grad.reshape(use.sizes).float().square()
            whole = energy.sum()
            passes[i] = passes[i] + (whole != 0)
            for j, layout in enumerate(possible[i]):
                mine = layout.split(energy).flatten(1).sum(1) @ chosen.to(energy.device)
                # Shares, and not sums of both passes: one sample may have far larger gradients than all others.
                shares[i][j] = shares[i][j] + torch.where(whole != 0, mine / whole, 0)
    found = [_best(*item, rows) for item in zip(uses, possible, shares, passes, strict=True)]
    return tuple(layout for layout, _ in found), all(certain for _, certain in found)


def _best(
    use: Use, possible: Sequence[Layout], shares: Sequence[Tensor], passes: Tensor, rows: int
) -> tuple[Layout, bool]:
    *parts, total = torch.stack([*shares, passes]).tolist()
    if total == 0:
        return possible[0], False
    ranked = sorted(range(len(parts)), key=lambda i: -parts[i])
    second = parts[ranked[1]] if len(ranked) > 1 else 0.0
    # NaN is not enough either.
    if not (parts[ranked[0]] > _ENOUGH * total and parts[ranked[0]] - second > _APART * total):
        error = _unclear(use, rows, "the outputs of single samples depend on all of them alike")
        raise error
    return possible[ranked[0]], True


def _weights(root: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Random weights of the output's entries, zero for samples that are not chosen."""
    drawn = torch.randn(root.shape, generator=generator, device="cpu") * chosen.view(-1, *[1] * (root.ndim - 1))
    return drawn.to(root)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)


def _unclear(use: Use, rows: int, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The output of {use} has leading sizes {tuple(use.sizes[: use.num_lead])}, and which of its entries belong to "
        f"which of the {rows} samples cannot be told: {why}. Remedy: pass and return the batch in dimension 0 of the "
        "model, or leave the layer to AdamW with skip=."
    )
