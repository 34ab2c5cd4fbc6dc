"""Softmax-free attention the long way: one sample, one head and one window at a time, with an inverse in the open."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import steepest as st

__all__ = ["cells", "dense", "gaussian", "layer_by_hand", "map_points", "runs"]


def gaussian(x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """The kernel by differences, `[n, m]`."""
    return (-0.5 * scale * (x.unsqueeze(1) - y.unsqueeze(0)).square().sum(-1)).exp()


def dense(
    query: Tensor,
    value: Tensor,
    points: Tensor,
    *,
    scale: float | None = None,
    normalize: bool = True,
    ridge: float = 1e-2,
) -> Tensor:
    """The formula for one sequence: query `[n, d]`, value `[n, e]`, points `[m, d]`."""
    scale = 1 / math.sqrt(query.shape[1]) if scale is None else scale
    between, kernel = gaussian(query, points, scale), gaussian(points, points, scale)
    inverse = torch.linalg.inv(kernel + ridge * torch.eye(len(points), dtype=kernel.dtype))
    if normalize:
        root = torch.diag(kernel.sum(1) ** -0.5)
        inverse = root @ inverse @ root
    return between @ inverse @ between.T @ value


def runs(tokens: list[int], number: int) -> list[list[int]]:
    """Tokens cut into runs: token i of n goes to run floor(i m / n)."""
    parts = min(number, len(tokens))
    return [[t for i, t in enumerate(tokens) if i * parts // len(tokens) == run] for run in range(parts)]


def cells(size: tuple[int, int], rows: int, columns: int) -> list[list[int]]:
    """Tokens of a map cut into a grid of so many rows and columns of cells."""
    height, width = size
    return [
        [
            i * width + j
            for i in range(height)
            for j in range(width)
            if (i * rows // height, j * columns // width) == cell
        ]
        for cell in ((row, column) for row in range(rows) for column in range(columns))
    ]


def map_points(size: tuple[int, ...]) -> list[tuple[int, int]]:
    """Row and column of every token; a sequence is a map of one row."""
    height, width = size if len(size) == 2 else (1, *size)
    return [(i, j) for i in range(height) for j in range(width)]


def _convolved(weight: Tensor, tokens: Tensor, size: tuple[int, ...], corner: tuple[int, int]) -> Tensor:
    """One window of a convolution, `weight [out, in, *window]`, over tokens `[n, in]`; zero outside the map."""
    weight = weight if weight.ndim == 4 else weight.unsqueeze(2)
    at = {place: token for token, place in enumerate(map_points(size))}
    total = torch.zeros(len(weight), dtype=tokens.dtype)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            token = at.get((corner[0] + i, corner[1] + j))
            if token is not None:
                total = total + weight[:, :, i, j] @ tokens[token]
    return total


def _strided(layer: st.nn.SoftmaxFreeAttention, heads: Tensor, there: list[int], size: tuple[int, ...]) -> Tensor:
    """Landmarks `[m, head_dim]` of a convolution, without those that see no token."""
    stride = layer.landmark_stride or 1
    places = map_points(size)
    high = stride if layer.dims == 2 else 1
    corners = sorted({(places[t][0] // high * high, places[t][1] // stride * stride) for t in there})
    points = []
    for corner in corners:
        point = _convolved(layer.landmark_conv.weight, heads, size, corner)
        point = (point - point.mean()) / (point.var(unbiased=False) + layer.landmark_norm.eps).sqrt()
        point = point * layer.landmark_norm.weight + layer.landmark_norm.bias
        points.append(point * (1 + torch.erf(point / math.sqrt(2))) / 2)
    return torch.stack(points)


def layer_by_hand(
    layer: st.nn.SoftmaxFreeAttention,
    tokens: Tensor,
    *,
    value: Tensor | None = None,
    absent: list[int] | None = None,
    size: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """What the layer gives for one sequence `[n, embed_dim]`; `grid` is that of averaged landmarks on a map."""
    shape = size or (len(tokens),)
    there = [t for t in range(len(tokens)) if t not in (absent or [])]
    present = torch.zeros(len(tokens), 1, dtype=tokens.dtype)
    present[there] = 1
    tokens, value = tokens * present, (tokens if value is None else value) * present
    queries = (tokens @ layer.q_proj.weight.T + (0 if layer.q_proj.bias is None else layer.q_proj.bias)) * present
    values = (value @ layer.v_proj.weight.T + (0 if layer.v_proj.bias is None else layer.v_proj.bias)) * present
    outputs, width = [], layer.head_dim
    for head in range(layer.num_heads):
        part = slice(head * width, (head + 1) * width)
        q, v = queries[:, part] / width**0.25, values[:, part]
        if layer.log_bandwidth is not None:
            q = q / layer.log_bandwidth[head].exp()
        if layer.landmark_stride is not None:
            points = _strided(layer, q, there, shape)
        else:
            groups = runs(there, layer.num_landmarks) if grid is None else cells(size, *grid)
            groups = [[t for t in group if t in there] for group in groups]
            points = torch.stack([q[group].mean(0) for group in groups if group])
        ridge = layer.inverse.ridge
        mixed = present * dense(q, v * present, points, scale=1.0, normalize=layer.normalize, ridge=ridge)
        if layer.value_conv is not None:
            weight = layer.value_conv.weight[head : head + 1]
            reach = weight.shape[-1] // 2
            corners = [(i - (reach if layer.dims == 2 else 0), j - reach) for i, j in map_points(shape)]
            features = [
                torch.cat([_convolved(weight, v[:, c : c + 1], shape, corner) for corner in corners])
                for c in range(width)
            ]
            mixed = mixed + torch.stack(features, 1)
        outputs.append(mixed)
    out = torch.cat(outputs, 1) @ layer.out_proj.weight.T
    return out if layer.out_proj.bias is None else out + layer.out_proj.bias
