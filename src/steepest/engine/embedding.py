"""Record of an embedding table: a linear map whose input is one-hot, so only token numbers are kept."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from steepest._typing import Sharing
from steepest.engine.layout import Layout
from steepest.engine.records import CHUNK_BYTES, KroneckerFactors, Record, at_least_float32, column_chunks
from steepest.engine.tape import Slot, Tape, Use, function_name, refusal
from steepest.linalg.factors import product
from steepest.linalg.outer import MeanOuter

__all__ = ["EmbeddingRecord", "EmbeddingUse", "embedding"]


class EmbeddingRecord(Record):
    """Tokens and output gradients of an embedding.

    Args:
        weight: Qualified name of the table ``[num_embeddings, d]``.
        tokens: ``[R, S]``, integers.
        output_grads: ``[R, S, d]``, zero at padding tokens.
        num_embeddings: Number of rows of the table.
    """

    def __init__(self, weight: str, tokens: Tensor, output_grads: Tensor, num_embeddings: int) -> None:
        self._weight, self._tokens = weight, tokens
        self._g = self._like = at_least_float32(output_grads)
        self.names = (weight,)
        self.num_rows = len(tokens)
        self.shapes = {weight: torch.Size([num_embeddings, output_grads.shape[-1]])}

    def per_sample_grads(self) -> dict[str, Tensor]:
        """Output gradients added up token by token."""
        grads = self._g.new_zeros(self.num_rows, *self.shapes[self._weight])
        index = self._tokens.unsqueeze(-1).expand_as(self._g)
        return {self._weight: grads.scatter_add_(1, index, self._g)}

    def gram(self, dtype: torch.dtype, max_memory: int) -> Tensor:
        """``sum_st [token_ns = token_mt] (g_ns . g_mt)``, or through explicit gradients of a small table."""
        rows, shared = self._tokens.shape
        if self.shapes[self._weight][0] < shared * shared:
            return self.materialize().gram(dtype, max_memory)
        tokens, g = self._tokens.flatten(), self._g.flatten(0, 1).to(dtype)
        gram = g.new_empty(rows, rows)
        for chunk in column_chunks(rows, 2 * shared * shared * rows * dtype.itemsize, min(max_memory, CHUNK_BYTES)):
            span = slice(chunk.start * shared, chunk.stop * shared)
            products = g[span] @ g.T
            products *= tokens[span, None] == tokens
            gram[chunk] = products.view(-1, shared, rows, shared).sum((1, 3))
        return gram

    def cross_gram(self, other: Record, dtype: torch.dtype, max_memory: int) -> Tensor:
        """``sum_st [token_ns = token_mt] (g_ns . h_mt)``, or through explicit gradients of a small table."""
        size, shared = self.shapes[self._weight][0], self._tokens.shape[1]
        if not isinstance(other, EmbeddingRecord) or size < shared * other._tokens.shape[1]:
            return super().cross_gram(other, dtype, max_memory)
        tokens, h = other._tokens.flatten(), other._g.flatten(0, 1).to(dtype)
        gram = h.new_empty(self.num_rows, other.num_rows)
        row_bytes = 2 * shared * len(tokens) * dtype.itemsize
        for chunk in column_chunks(self.num_rows, row_bytes, min(max_memory, CHUNK_BYTES)):
            products = self._g[chunk].flatten(0, 1).to(dtype) @ h.T
            products *= self._tokens[chunk].reshape(-1, 1) == tokens
            gram[chunk] = products.view(-1, shared, other.num_rows, other._tokens.shape[1]).sum((1, 3))
        return gram

    def parts(self) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        """Name and number of tokens of the table; tokens and output gradients."""
        return (self._weight, self.shapes[self._weight][0]), (self._tokens, self._g)

    @classmethod
    def of_parts(cls, options: tuple[Any, ...], tensors: Sequence[Tensor]) -> "EmbeddingRecord":
        """Join them again."""
        tokens, grads = tensors
        return EmbeddingRecord(options[0], tokens, grads, options[1])

    def vjp(self, weights: Tensor) -> dict[str, Tensor]:
        """One weighted scatter."""
        g = (self._g * weights.to(self._g.dtype).view(-1, 1, 1)).flatten(0, 1)
        out = g.new_zeros(self.shapes[self._weight])
        return {self._weight: out.index_add_(0, self._tokens.flatten(), g)}

    def jvp(self, vector: Mapping[str, Tensor]) -> Tensor:
        """``sum_s g_ns . v[token_ns]``."""
        table = vector[self._weight].to(self._g.dtype)
        return (table[self._tokens] * self._g).sum((1, 2))

    def project(self, vectors: Mapping[str, Tensor], max_memory: int) -> Tensor:
        """``sum_s g_ns . V_l[token_ns]``, or through explicit gradients of a small table."""
        shared, size = self._tokens.shape[1], self.shapes[self._weight][0]
        if shared >= size:
            return super().project(vectors, max_memory)
        table = vectors[self._weight].to(self._g.dtype)
        out = self._g.new_empty(self.num_rows, len(table))
        row_bytes = len(table) * shared * self._g.shape[2] * self._g.itemsize
        for rows in column_chunks(self.num_rows, row_bytes, min(max_memory, CHUNK_BYTES)):
            looked_up = table[:, self._tokens[rows]]  # [L, rows, S, d]
            out[rows] = looked_up.mul_(self._g[rows]).sum((2, 3)).T
        return out

    def squared_norms(self, max_memory: int) -> Tensor:
        """``sum_st [token_ns = token_nt] (g_ns . g_nt)``, or through explicit gradients of a small table."""
        shared, size = self._tokens.shape[1], self.shapes[self._weight][0]
        if shared * shared >= size:
            return super().squared_norms(max_memory)
        out = self._g.new_empty(self.num_rows, dtype=torch.float64)
        row_bytes = 8 * shared * (2 * shared + self._g.shape[2])
        for rows in column_chunks(self.num_rows, row_bytes, min(max_memory, CHUNK_BYTES)):
            tokens, g = self._tokens[rows], self._g[rows].double()
            same = tokens.unsqueeze(2) == tokens.unsqueeze(1)
            out[rows] = torch.bmm(g, g.mT).mul_(same).sum((1, 2)).clamp_(min=0)  # below 0 by rounding alone
        return out

    def take(self, rows: slice) -> "EmbeddingRecord":
        """Keep some rows: views, nothing is copied."""
        return EmbeddingRecord(self._weight, self._tokens[rows], self._g[rows], self.shapes[self._weight][0])

    def kronecker_factors(self, sharing: Sharing) -> KroneckerFactors:
        """Frequencies of the tokens, the diagonal of A: every token a sample of its own, whatever the sharing."""
        g, tokens = self._g.flatten(0, 1), self._tokens.flatten()
        counts = g.new_zeros(self.shapes[self._weight][0]).index_add_(0, tokens, g.new_ones(len(g)))
        grads = MeanOuter(self.num_rows)
        grads.add(g.T)
        return KroneckerFactors(counts.div_(len(g)), grads.value(), len(g))

    def second_moment(self, grad_basis: Tensor, input_basis: Tensor) -> Tensor:
        """Mean square of the rows, ``[d, num_embeddings]``: gradients of one token in one row add up first."""
        del input_basis  # a diagonal A is in its eigenbasis
        size = self.shapes[self._weight][0]
        rows = torch.arange(self.num_rows, device=self._g.device).unsqueeze(1)
        keys, order = (rows * size + self._tokens).flatten().sort()
        g = product(self._g.flatten(0, 1)[order].to(grad_basis.dtype), grad_basis)
        place = (keys.diff(prepend=keys[:1]) != 0).cumsum(0)
        sums = torch.zeros_like(g).index_add_(0, place, g)
        token = torch.zeros_like(keys).scatter_(0, place, keys % size)
        moment = g.new_zeros(size, g.shape[1]).index_add_(0, token, sums.square_())
        return moment.T / self.num_rows

    def restrict(self, index: Mapping[str, Tensor]) -> "EmbeddingRecord":
        """Keep some rows of the table: other tokens get no gradient."""
        kept = index[self._weight]
        position = kept.new_full((self.shapes[self._weight][0],), -1)
        position[kept] = torch.arange(len(kept), device=kept.device)
        tokens = position[self._tokens]
        g = self._g * (tokens >= 0).unsqueeze(-1)
        return EmbeddingRecord(self._weight, tokens.clamp(min=0), g, len(kept))

    def concat_rows(self, others: Sequence[Self]) -> Self | None:
        """Stack rows of equal numbers of tokens."""
        parts = [self, *others]
        if len({p._tokens.shape[1] for p in parts}) > 1:
            return None
        size = self.shapes[self._weight][0]
        return type(self)(self._weight, torch.cat([p._tokens for p in parts]), torch.cat([p._g for p in parts]), size)

    def concat_shared(self, other: Self) -> Self:
        """A second use is more tokens."""
        size = self.shapes[self._weight][0]
        return type(self)(
            self._weight, torch.cat([self._tokens, other._tokens], 1), torch.cat([self._g, other._g], 1), size
        )


class EmbeddingUse(Use):
    """A call of `F.embedding`."""

    def __init__(self, tape: Tape, tokens: Tensor, table: Slot, padding_idx: int | None, out: Tensor) -> None:
        super().__init__(tape, "embedding", (table,), out, tokens, num_lead=tokens.ndim)
        self._table, self._padding_idx = table, padding_idx

    def record(self, output_grads: Tensor, layout: Layout, rows: int) -> Record:
        """Bring tokens and output gradients to canonical layout; padding gets no gradient."""
        tokens, g = (layout.canonical(t, self.num_lead) for t in (self.inputs, output_grads))
        size = self._table.tensor.shape[0]
        if self._padding_idx is not None:
            g = g * (tokens != self._padding_idx % size).unsqueeze(-1)
        return self._settle(EmbeddingRecord(str(self._key(self._table)), tokens, g, size))


def embedding(
    tape: Tape,
    func: Any,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Rule of `F.embedding`."""
    table = tape.trained(weight)
    if table is None:
        return func(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if max_norm is not None or scale_grad_by_freq:
        option = "max_norm" if max_norm is not None else "scale_grad_by_freq"
        raise refusal(
            function_name(func),
            [table],
            f"{option} makes its gradient depend on the whole batch",
            f"build the embedding without {option}",
        )
    constant = tape.slot(input) is not None
    if constant and (input.ndim < 2 or len(input) == 1):  # positions, the same for every sample: no batch yet
        return tape.derive(func(input, weight, padding_idx), [table])
    out = func(input, table.leaf(), padding_idx, None, norm_type, False, False)
    tape.uses.append(EmbeddingUse(tape, input, table, padding_idx, out))
    return out
