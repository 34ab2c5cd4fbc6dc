"""Frequent Directions: a small matrix that stands for a long stream of rows, with a bound on what it leaves out."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steepest._validation import check_integer
from steepest.errors import InvalidOptionError, NonFiniteError
from steepest.linalg.column_blocks import gram, multiply, squared_norm

__all__ = ["FrequentDirections"]

_FLAT = ""  # the name of the only block of a sketch that is fed with tensors
_STATE = ("sketch_size", "robust", "num_rows", "squared_norm", "taken", "settled", "blocks")


class FrequentDirections:
    r"""Sketch :math:`B \in R^{l \times D}` of all rows :math:`A \in R^{n \times D}` inserted so far.

    .. math:: 0 \preceq A^T A - B^T B \preceq \Delta I, \qquad
        \Delta \le \min_{k \le l} \frac{\|A - A_k\|_F^2}{l + 1 - k}

    with A_k the best approximation of rank k. A buffer of 2l rows is filled; once full it is shrunk to l rows by

    .. math:: K = B B^T = U \Lambda U^T, \qquad \delta = \lambda_{l+1}, \qquad
        B \leftarrow \Lambda^{-1/2} (\Lambda - \delta)_+^{1/2} U^T B

    and Delta, the `certificate`, is the sum of the deltas. K is ``[2l, 2l]`` and formed in float64: no decomposition
    of anything of D columns is needed.

    Why the bound holds. A shrink takes at most delta from every direction, so :math:`A^T A - B^T B \preceq \Delta I`,
    and it takes delta from the l + 1 largest at least, so :math:`(l + 1) \Delta \le \|A\|_F^2 - \|B\|_F^2`. With the k
    leading right singular vectors :math:`v_i` of A, :math:`\|A\|_F^2 - \|B\|_F^2 \le \|A - A_k\|_F^2 + \sum_{i \le k}
    (\|A v_i\|^2 - \|B v_i\|^2) \le \|A - A_k\|_F^2 + k \Delta`. The same holds after `merge`.

    Rows are kept in float32, where A means the rows as float32 holds them; float16 storage would round by more than
    the one-sided bound allows. Both bounds hold up to float32's rounding, about 1e-7 of the largest eigenvalue of
    :math:`A^T A`. Memory: ``2 l D`` numbers, and a few MiB while it works.

    With ``robust=True`` (Luo et al. 2017, arXiv 1705.05067) the middle of the interval is taken: :math:`\|A^T A - B^T B
    - \alpha I\|_2 \le \alpha` with `ridge` :math:`\alpha = \Delta / 2`, which the `certificate` then is too.

    Sources: Liberty 2013 (arXiv 1206.0594); Ghashami, Liberty, Phillips, Woodruff 2016 (arXiv 1501.01711), theorem 1.1,
    whose shrink takes delta from l directions and has l - k below the fraction.

    Args:
        sketch_size: l, how many rows are kept at most.
        robust: Whether the sketch stands for ``B^T B + ridge I``.

    Raises:
        InvalidOptionError: If an option is impossible.

    Example:
        >>> import torch, steepest as st
        >>> rows = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> sketch = st.FrequentDirections(sketch_size=2)
        >>> sketch.insert(rows)
        >>> B = sketch.sketch()
        >>> sketch.certificate  # the third eigenvalue of A^T A
        1.0
        >>> (rows.T @ rows - B.T @ B).diagonal().round(decimals=5)
        tensor([1., 1., 1.])
    """

    def __init__(self, sketch_size: int = 64, *, robust: bool = False) -> None:
        self._size = check_integer("sketch_size", sketch_size, low=1)
        self._robust = bool(robust)
        self._reset()

    def _reset(self) -> None:
        self._blocks: dict[str, Tensor] = {}  # [2l, numel] each
        self._filled = self._num_rows = 0
        self._squared_norm = self._taken = 0.0  # taken: the sum of the deltas of all shrinks
        self._settled = True  # at most l rows, orthogonal, largest first
        self._spectrum: tuple[Tensor, Tensor] | None = None  # of the rows in the buffer

    def __repr__(self) -> str:
        columns = sum(block.shape[1] for block in self._blocks.values())
        robust = ", robust=True" if self._robust else ""
        return f"FrequentDirections(sketch_size={self._size}{robust}, rows={self._num_rows}, columns={columns})"

    @property
    def sketch_size(self) -> int:
        """How many rows are kept at most, l."""
        return self._size

    @property
    def robust(self) -> bool:
        """Whether the sketch stands for ``B^T B + ridge I``."""
        return self._robust

    @property
    def num_rows(self) -> int:
        """How many rows were inserted, those of merged sketches included."""
        return self._num_rows

    @property
    def squared_norm(self) -> float:
        """Sum of the squares of everything inserted."""
        return self._squared_norm

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return sum(block.nbytes for block in self._blocks.values())

    @property
    def certificate(self) -> float:
        """Bound on the spectral norm of what `sketch` leaves out of ``A^T A``: the sum of the deltas, or half of it."""
        total = self._taken + self._next_delta()
        return total / 2 if self._robust else total

    @property
    def ridge(self) -> float:
        """Multiple of the identity that belongs to a robust sketch; 0 for a plain one."""
        return self.certificate if self._robust else 0.0

    @torch.no_grad()
    def insert(self, rows: Tensor | Mapping[str, Tensor]) -> None:
        """Take rows.

        Args:
            rows: ``[n, D]``, or blocks of columns ``[n, numel]`` by name, as `Jacobian.sketch_into` hands them over;
                always of the same names and widths. Of any floating-point dtype.

        Raises:
            InvalidOptionError: If they are no matrices of real floating-point numbers, or their columns are not those
                of the rows before.
            NonFiniteError: If they hold NaN, or numbers too large for float32; nothing is changed then.
        """
        blocks = self._checked(rows)
        total = _finite(self._squared_norm + squared_norm(blocks.values()))
        self._append(blocks)
        self._squared_norm = total
        self._num_rows += len(next(iter(blocks.values())))

    @torch.no_grad()
    def compress(self) -> None:
        """Bring the buffer down to l rows at most, in place: orthogonal ones, largest first."""
        if not self._settled:
            self._taken += self._next_delta()
            weights = self._weights()
            for block in self._blocks.values():
                multiply(weights, block, out=block)
            self._filled, self._settled, self._spectrum = len(weights), True, None

    @torch.no_grad()
    def sketch(self) -> Any:
        """Return the sketch B; more rows can follow as if it had not been asked for.

        Returns:
            ``[l', D]`` in float32 with l' at most l, or such blocks by name if it was fed so. The rows are orthogonal,
            the largest first.

        Raises:
            InvalidOptionError: If nothing was inserted yet.
        """
        if not self._blocks:
            raise InvalidOptionError("The sketch has seen no rows, so their width is unknown: insert rows first.")
        if self._settled:
            made = {name: block[: self._filled].clone() for name, block in self._blocks.items()}
        else:
            weights = self._weights()
            made = {name: block.new_empty(len(weights), block.shape[1]) for name, block in self._blocks.items()}
            for name, block in self._blocks.items():
                multiply(weights, block, out=made[name])
        return made.get(_FLAT, made)

    @torch.no_grad()
    def merge(self, other: "FrequentDirections") -> None:
        """Take the rows that another sketch stands for, such as that of another shard; the other stays as it is.

        Args:
            other: A sketch of the same size and kind, over the same columns.

        Raises:
            InvalidOptionError: If it is another kind of sketch.
            NonFiniteError: If both together are too large for float32; nothing is changed then.
        """
        if not isinstance(other, FrequentDirections):
            raise InvalidOptionError(f"merge() was given a {type(other).__name__}: give another FrequentDirections.")
        if (other._size, other._robust) != (self._size, self._robust):
            raise InvalidOptionError(
                f"{other!r} cannot be merged into {self!r}: their bounds differ. Make all sketches with one "
                "sketch_size and one value of robust."
            )
        if other is self:  # its rows would change while they are read
            other = copy.deepcopy(self)
        self.absorb(other.summary(), other.rows())

    def summary(self) -> dict[str, Any]:
        """What another process has to know to `absorb` this sketch beside its `rows`: plain values, widths by block."""
        return {
            "num_rows": self._num_rows,
            "squared_norm": self._squared_norm,
            "taken": self._taken,
            "filled": self._filled,
            "columns": {name: block.shape[1] for name, block in self._blocks.items()},
        }

    def rows(self) -> dict[str, Tensor]:
        """What stands for the rows inserted so far, by block: contiguous views, at most 2l, or l after `compress`."""
        return {name: block[: self._filled] for name, block in self._blocks.items()}

    @torch.no_grad()
    def absorb(self, summary: Mapping[str, Any], rows: Mapping[str, Tensor]) -> None:
        """As `merge`, of a sketch that lies elsewhere; it must have the same options.

        Args:
            summary: What `summary` said of it.
            rows: Its `rows`.

        Raises:
            InvalidOptionError: If its columns are others.
            NonFiniteError: If both together are too large for float32; nothing is changed then.
        """
        total = _finite(self._squared_norm + summary["squared_norm"])
        if rows:
            self._append(self._checked(rows.get(_FLAT, rows)))
        self._num_rows += summary["num_rows"]
        self._squared_norm = total
        self._taken += summary["taken"]

    def state_dict(self) -> dict[str, Any]:
        """Return all of the sketch, to go on bit by bit as if nothing had happened; a copy."""
        return {
            "sketch_size": self._size,
            "robust": self._robust,
            "num_rows": self._num_rows,
            "squared_norm": self._squared_norm,
            "taken": self._taken,
            "settled": self._settled,
            "blocks": {name: block[: self._filled].clone() for name, block in self._blocks.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state.

        Args:
            state: What `state_dict` returned, of a sketch of the same options.

        Raises:
            InvalidOptionError: If it belongs to a sketch of other options, or is not whole; nothing is changed then.
        """
        lacking = [name for name in _STATE if name not in (state or ())]
        if lacking:
            raise InvalidOptionError(
                f"The saved sketch lacks {', '.join(lacking)}: give all that state_dict() returned."
            )
        if (state.get("sketch_size"), state.get("robust")) != (self._size, self._robust):
            raise InvalidOptionError(
                f"The saved sketch has sketch_size={state.get('sketch_size')!r} and robust={state.get('robust')!r}, "
                f"this one {self._size} and {self._robust}: make it with the saved options."
            )
        self._reset()
        for name, rows in state["blocks"].items():
            self._blocks[name] = torch.zeros(2 * self._size, rows.shape[1], dtype=torch.float32, device=rows.device)
            self._blocks[name][: len(rows)] = rows
            self._filled = len(rows)
        self._num_rows, self._squared_norm = state["num_rows"], state["squared_norm"]
        self._taken, self._settled = state["taken"], state["settled"]

    def _checked(self, rows: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring rows to one form and compare them with those before."""
        blocks = dict(rows) if isinstance(rows, Mapping) else {_FLAT: rows}
        for name, block in blocks.items():
            if not isinstance(block, Tensor):
                raise InvalidOptionError(
                    f"Rows{name and f' of {name!r}'} are a {type(block).__name__}: give a tensor of shape [n, D], or "
                    "such blocks of columns by name; torch.as_tensor makes one of an array."
                )
            if block.ndim != 2 or block.layout != torch.strided or not block.is_floating_point():
                raise InvalidOptionError(
                    f"Rows{name and f' of {name!r}'} of shape {tuple(block.shape)}, {block.dtype}, {block.layout}: "
                    "give a dense matrix of real floating-point numbers, one row for each sample."
                )
        found = {name: block.shape[1] for name, block in blocks.items()}
        known = {name: block.shape[1] for name, block in self._blocks.items()} or found
        if not found or found != known or len({len(block) for block in blocks.values()}) > 1:
            raise InvalidOptionError(
                f"The rows have shapes {_shapes(blocks)}, and the sketch has columns {known or 'of no block'}: give "
                "every block with as many rows as the others and the columns that it had at first."
            )
        return {name: block.detach() for name, block in blocks.items()}

    def _append(self, blocks: Mapping[str, Tensor]) -> None:
        """Fill the buffer, and shrink it whenever a further row finds it full."""
        if not self._blocks:
            shapes = {name: (2 * self._size, block.shape[1]) for name, block in blocks.items()}
            self._blocks = {n: torch.zeros(s, dtype=torch.float32, device=blocks[n].device) for n, s in shapes.items()}
        total, start = len(next(iter(blocks.values()))), 0
        while start < total:
            if self._filled == 2 * self._size:
                self.compress()
            stop = min(total, start + 2 * self._size - self._filled)
            for name, block in self._blocks.items():
                block[self._filled : self._filled + stop - start] = blocks[name][start:stop]
            self._filled += stop - start
            self._settled, self._spectrum, start = False, None, stop

    def _next_delta(self) -> float:
        """What the next shrink would take from each of l + 1 directions."""
        if self._filled <= self._size:
            return 0.0
        return float(self._eigen()[0][self._size].clamp(min=0))

    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of ``K = B B^T``, largest first, and its eigenvectors as columns: on the CPU, in float64."""
        if self._spectrum is None:
            values, vectors = torch.linalg.eigh(gram(self._blocks.values(), self._filled).cpu())
            self._spectrum = values.flip(0), vectors.flip(1)
        return self._spectrum

    def _weights(self) -> Tensor:
        """``[l', filled]``: what a shrink multiplies the buffer by. Eigenvalues that are zero or rounding are safe."""
        values, vectors = self._eigen()
        delta = self._next_delta()
        kept = int((values[: self._size] > delta).sum())
        values = values[:kept]
        return vectors[:, :kept].T * ((values - delta) / values).sqrt().unsqueeze(1)


def _finite(total: float) -> float:
    """Refuse a norm of all rows that float32 does not hold, since entries of the sketch may come up to it."""
    if not total < torch.finfo(torch.float32).max ** 2:
        raise NonFiniteError(
            "The rows hold NaN or infinity, or numbers too large for a float32 sketch, which was left as it was. "
            "Remedy: look for a sample whose gradient overflows, or scale all rows down by one factor."
        )
    return total


def _shapes(blocks: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name and f'{name}: '}{tuple(block.shape)}" for name, block in blocks.items()) or "of no block"
