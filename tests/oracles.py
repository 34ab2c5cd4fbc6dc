"""Slow truths that know nothing of steepest: autograd row by row, torch.func, and dense linear algebra."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from zoo import Batch, Entry, Rows

Grads = dict[str, Tensor]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def stack_rows(rows: Rows) -> Tensor:
    """A tensor of rows, or its named blocks stacked in the order of the dict."""
    return torch.cat(list(rows.values())) if isinstance(rows, Mapping) else rows


def jacobian(closure: Callable[[], Rows], parameters: Mapping[str, Tensor]) -> Grads:
    """One forward, one backward per row: [R, *shape] for every parameter, zeros where it is unused."""
    rows = stack_rows(closure())
    names, leaves = list(parameters), list(parameters.values())
    per_row = [torch.autograd.grad(r, leaves, retain_graph=True, materialize_grads=True) for r in rows]
    return {name: torch.stack([grads[i] for grads in per_row]) for i, name in enumerate(names)}


class _OneRow(nn.Module):
    """The loss of one sample as a module's forward, so that functional_call reaches every parameter."""

    def __init__(self, entry: Entry, model: nn.Module) -> None:
        super().__init__()
        self.entry, self.model = entry, model

    def forward(self, *sample: Tensor) -> Tensor:
        return self.entry.losses(self.model, tuple(t.unsqueeze(0) for t in sample)).squeeze(0)


def functional_jacobian(entry: Entry, model: nn.Module, batch: Batch) -> Grads:
    """The same by torch.func: every sample alone, so rows cannot interact."""
    module = _OneRow(entry, model)
    parameters = {name: p.detach() for name, p in trainable(module).items()}
    one = grad(lambda values, *sample: functional_call(module, values, sample))
    grads = vmap(one, in_dims=(None, *(0 for _ in batch)))(parameters, *batch)
    return {name.removeprefix("model."): g for name, g in grads.items()}


def to_double(model: nn.Module, batch: Batch) -> tuple[nn.Module, Batch]:
    """Float64 copies; integer inputs stay as they are."""
    return copy.deepcopy(model).double(), tuple(t.double() if t.is_floating_point() else t for t in batch)


def entry_truth(entry: Entry, model: nn.Module, batch: Batch) -> Grads:
    """The float64 Jacobian of an entry at the model's own weights, whatever their dtype."""
    model, batch = to_double(model, batch)
    return jacobian(entry.closure(model, batch), trainable(model))


def dense(grads: Grads) -> Tensor:
    """[R, P], the parameters flattened and concatenated in the order of the dict."""
    return torch.cat([g.reshape(len(g), -1) for g in grads.values()], 1)


def minimum_norm(J: Tensor, r: Tensor) -> Tensor:
    """The minimum-norm least-squares solution of J d = r by LAPACK, in float64."""
    return torch.linalg.lstsq(J.double(), r.double().unsqueeze(1), driver="gelsd").solution.squeeze(1)


def truncated_pinv(J: Tensor, *, rank: int | None = None, rtol: float = 0.0, exponent: float = 1.0) -> Tensor:
    """V_k S_k^-exponent U_k^T from the full SVD in float64; kept: sigma > rtol * sigma_max, at most rank."""
    U, S, Vh = torch.linalg.svd(J.double(), full_matrices=False)
    # an exact zero has no inverse: what rounding leaves of it is cut even at rtol 0
    floor = max(rtol, torch.finfo(torch.float64).eps * max(J.shape)) * S[0]
    kept = int((floor < S).sum()) if rank is None else min(rank, int((floor < S).sum()))
    return Vh[:kept].T @ torch.diag(S[:kept] ** -exponent) @ U[:, :kept].T


def _relative(got: Tensor, want: Tensor) -> float:
    """The largest error relative to the largest entry; infinite where shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    scale = want.abs().max().item() or 1.0
    return (got.double() - want.double()).abs().max().item() / scale


def _per_sample_grads(jac: Any, truth: Grads) -> float:
    got = jac.per_sample_grads()
    shapes = {name: tuple(g.shape) for name, g in got.items()} == {n: tuple(g.shape) for n, g in truth.items()}
    return _relative(dense({n: got[n] for n in truth}), dense(truth)) if shapes else float("inf")


def _vjp(jac: Any, truth: Grads) -> float:
    weights = torch.linspace(-1, 2, jac.num_rows, dtype=torch.float64)
    got, want = jac.vjp(weights), {n: torch.tensordot(weights, g, 1) for n, g in truth.items()}
    if {n: g.shape for n, g in got.items()} != {n: g.shape for n, g in want.items()}:
        return float("inf")
    return _relative(*(torch.cat([g[n].double().reshape(-1) for n in truth]) for g in (got, want)))


def _jvp(jac: Any, truth: Grads) -> float:
    generator = torch.Generator().manual_seed(5)
    vector = {n: torch.randn(g.shape[1:], generator=generator, dtype=torch.float64) for n, g in truth.items()}
    want = dense(truth) @ torch.cat([v.reshape(-1) for v in vector.values()])
    dtypes = {n: g.dtype for n, g in jac.per_sample_grads().items()}
    return _relative(jac.jvp({n: v.to(dtypes[n]) for n, v in vector.items()}), want)


REDUCTIONS: dict[str, Callable[[Any, Grads], float]] = {
    "per_sample_grads": _per_sample_grads,
    "gram64": lambda jac, truth: _relative(jac.gram(precision="float64"), dense(truth) @ dense(truth).T),
    "gram32": lambda jac, truth: _relative(jac.gram(precision="float32"), dense(truth) @ dense(truth).T),
    "vjp": _vjp,
    "jvp": _jvp,
    "to_dense": lambda jac, truth: _relative(jac.to_dense(), dense(truth)),
}


def reduction_errors(jac: Any, truth: Grads, *, skip: tuple[str, ...] = ("gram32",)) -> dict[str, float]:
    """The error of every reduction of a Jacobian, fast or slow, against the dense truth."""
    truth = {name: g.double() for name, g in truth.items()}
    return {name: error(jac, truth) for name, error in REDUCTIONS.items() if name not in skip}
