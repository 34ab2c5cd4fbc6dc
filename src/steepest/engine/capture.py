"""One forward and one backward, recorded layer by layer."""

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from steepest._validation import check_integer
from steepest.engine.assembly import LayoutFinder, assemble, output_gradients, reached, single_row
from steepest.engine.components import ComponentBackward, vector_record
from steepest.engine.coverage import check_model
from steepest.engine.jacobian import Jacobian, caller_independent
from steepest.engine.records import Record
from steepest.engine.rules import TapeMode
from steepest.engine.tape import REFERENCE_REMEDY, Tape
from steepest.errors import CaptureError, InvalidOptionError, UnsupportedModelError

__all__ = ["Capture", "Rows", "check_rows", "named_trainable"]

Rows = Tensor | Mapping[str, Tensor]

DEFAULT_MAX_MEMORY = 1 << 28
NO_RECORDING = (
    "There is no recording to differentiate. Remedy: compute the rows inside `with capture:`; each recording serves "
    "one call of jacobian()."
)


class Capture:
    """Record what a model's layers see, and give the Jacobian of any rows computed from its output.

    Within ``with capture:`` every torch function that touches a parameter is intercepted (no module hook is ever
    registered) and the parameter is replaced by an alias of its own for that call. `jacobian` then runs one
    backward to the outputs of those calls; autograd skips all weight gradients.

    Supported: Linear with any leading dimensions; Conv1d/2d/3d in all their forms; LayerNorm, GroupNorm, InstanceNorm,
    RMSNorm, BatchNorm in eval mode; Embedding; PReLU; MultiheadAttention and the torch Transformer layers; bare
    parameters in elementwise operations, in ``cat`` after ``expand``, and as ``data @ parameter``; anything computed
    from parameters alone (views, masks, parametrizations, low-rank sums); shared and tied weights with their cross
    terms; autocast; activation checkpointing with use_reentrant=False.
    Everything else is refused by qualified name: at construction where the module tells, in `jacobian` otherwise.

    The independence probe, two more backwards, finds which dimension of each captured tensor carries the rows, and
    refuses models in which rows depend on each other. It runs on the first batch of every new graph, on its 2nd, 4th,
    8th, ... batch and on every ``probe_every``-th: an interaction that begins later, in numbers alone and not in the
    graph, is found at the next probe.

    Args:
        model: The module to record. It stays as it is.
        params: The parameters to differentiate; all that require grad by default.
        max_memory: Bytes that the products inside `Jacobian.gram` may take at a time, beside what is recorded and its
            float64 copy (the smallest step, one output channel, may exceed it).
        probe_every: Period of the independence probe; 1 probes every batch, at three times the backward's cost.

    Raises:
        UnsupportedModelError: If the model holds a layer without an exact rule, or nothing to train.
        InvalidOptionError: If an option is impossible.

    Example:
        >>> import torch, steepest as st
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> x, y = torch.randn(5, 3), torch.randn(5)
        >>> capture = st.Capture(model)
        >>> with capture:
        ...     losses = (model(x).squeeze(1) - y) ** 2
        >>> jacobian = capture.jacobian(losses)
        >>> jacobian
        Jacobian(rows=5, parameters=21, device=cpu)
        >>> jacobian.per_sample_grads()["0.weight"].shape
        torch.Size([5, 4, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        params: Iterable[Tensor] | None = None,
        max_memory: int = DEFAULT_MAX_MEMORY,
        probe_every: int = 256,
    ) -> None:
        self._params = named_trainable(model, params)
        self._model = model
        self._max_memory = check_integer("max_memory", max_memory, low=1)
        check_model(model, self._params)
        self._buffered = [(path, module) for path, module in model.named_modules() if module._buffers]
        self._finder = LayoutFinder(check_integer("probe_every", probe_every, low=1))
        self._components = ComponentBackward()
        self._mode: TapeMode | None = None
        self._tape: Tape | None = None

    def __repr__(self) -> str:
        total = sum(p.numel() for p in self._params.values())
        return f"{type(self).__name__}({type(self._model).__name__}, tensors={len(self._params)}, parameters={total})"

    @property
    def params(self) -> dict[str, Tensor]:
        """The differentiated parameters by qualified name."""
        return dict(self._params)

    def __enter__(self) -> Self:
        """Start recording.

        Returns:
            This capture.

        Raises:
            CaptureError: If it is recording already.
        """
        if any(isinstance(mode, TapeMode) for mode in _get_current_function_mode_stack()):
            raise CaptureError("A capture is recording already. Remedy: leave its `with` block first.")
        buffers = {f"{path}.{name}": b for path, module in self._buffered for name, b in module._buffers.items()}
        self._tape = Tape(self._params, {name: b for name, b in buffers.items() if b is not None})
        self._mode = TapeMode(self._tape)
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop recording; after an exception nothing is kept."""
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if kind is not None:
            self._tape = None

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the capture without a recording, and without what it learnt of graphs."""
        fresh = {"_finder": LayoutFinder(self._finder.every), "_components": ComponentBackward()}
        return {**self.__dict__, "_mode": None, "_tape": None, **fresh}

    @caller_independent
    def jacobian(self, rows: Rows) -> Jacobian:
        """Differentiate the rows computed inside the ``with`` block.

        Args:
            rows: ``[R]``, one entry for each loss or residual, entry n depending on sample n alone; where a captured
                batch holds m times R samples, each row owns m adjacent ones (losses averaged in sub-batches). Or
                ``[B, K]``, K rows of each sample, entries ``[n, :]`` depending on sample n alone. Or a mapping of
                names to such tensors, possibly from several forward passes, stacked in their order.

        Returns:
            The Jacobian of the rows in the parameters. Rows ``[B, K]`` are ordered sample by sample, as by
            ``rows.flatten()``. Their output gradients come from one backward over a batch of K selections, or from K
            backwards where torch has no rule for that (see `ComponentBackward`); layer inputs are kept once.

        Raises:
            CaptureError: If there is no recording, or the rows do not come from it.
            UnsupportedModelError: If the rows interact, or a parameter is used in a way that has no rule.
        """
        if self._mode is not None:
            raise CaptureError("The capture is still recording. Remedy: call jacobian() after the `with` block.")
        tape, self._tape = self._tape, None
        if tape is None:
            raise CaptureError(NO_RECORDING)
        blocks = check_rows(rows)
        self._check_without_grad(tape)
        parts = []
        for number, block in enumerate(blocks):
            last = number == len(blocks) - 1
            records = self._records if block.ndim == 1 else self._vector_records
            parts.append((block.numel(), records(tape, block, keep=not last)))
        if not any(records for _, records in parts):
            raise CaptureError(
                "The rows depend on no parameter that the capture recorded. Remedy: call the captured model itself, "
                "inside `with capture:`, and compute the rows from its output without detach() or no_grad()."
            )
        shapes = {name: p.shape for name, p in self._params.items()}
        example = next(iter(self._params.values()))
        return Jacobian(
            assemble(parts), shapes, sum(rows for rows, _ in parts), self._max_memory, blocks[0].device, example.dtype
        )

    def _records(self, tape: Tape, rows: Tensor, *, keep: bool) -> list[Record]:
        """Differentiate one block of rows."""
        uses, signature = reached(rows, tape.uses)
        layouts = self._finder.known(signature)
        probing = bool(uses) and layouts is None and len(rows) > 1
        grads = output_gradients(rows, uses, tape.params, None, keep or probing)
        if probing:

            def probe(weights: Tensor, last: bool) -> list[Tensor]:
                return output_gradients(rows, uses, tape.params, weights, keep or not last)

            layouts = self._finder.find(uses, grads, probe, signature)
        elif layouts is None:
            layouts = single_row(uses, grads)
        return [use.record(grad, layout, len(rows)) for use, grad, layout in zip(uses, grads, layouts, strict=True)]

    def _vector_records(self, tape: Tape, rows: Tensor, *, keep: bool) -> list[Record]:
        """Differentiate one block ``[B, K]``; the probe takes one combination of each sample's rows."""
        uses, signature = reached(rows, tape.uses)
        layouts = self._finder.known(signature)
        if uses and layouts is None and len(rows) > 1:
            combine = self._finder.coefficients(rows.shape[1], rows.device)
            whole = output_gradients(rows, uses, tape.params, combine.expand(rows.shape), True)

            def probe(weights: Tensor, _last: bool) -> list[Tensor]:
                return output_gradients(rows, uses, tape.params, weights.unsqueeze(1) * combine, True)

            layouts = self._finder.find(uses, whole, probe, signature)
            del whole
        grads = self._components.gradients(rows, uses, tape.params, signature, keep)
        if layouts is None:
            layouts = single_row(uses, [grad[0] for grad in grads])
        records = []
        for use, layout in zip(uses, layouts, strict=True):  # each use's gradients go once its record has its own
            records.append(vector_record(use, grads.pop(0), layout, len(rows)))
        return records

    def _check_without_grad(self, tape: Tape) -> None:
        """Refuse a parameter whose only uses had gradients switched off: reentrant checkpointing looks like that."""
        lost = sorted(tape.without_grad - {name for use in tape.uses for name in use.names})
        if lost:
            raise UnsupportedModelError(
                f"Parameter {', '.join(map(repr, lost))} was used with gradients switched off (torch.no_grad, or "
                "reentrant activation checkpointing), so its part of the Jacobian is lost. Remedy: freeze it with "
                f"requires_grad_(False), or checkpoint with use_reentrant=False, {REFERENCE_REMEDY}."
            )


def named_trainable(model: nn.Module, params: Iterable[Tensor] | None) -> dict[str, Tensor]:
    """Find the parameters to differentiate and their qualified names.

    Args:
        model: The model.
        params: Some of its parameters, or None for all that require grad.

    Returns:
        Parameters by qualified name, in the model's order.

    Raises:
        InvalidOptionError: If ``model`` is no module or a parameter is not the model's.
        UnsupportedModelError: If nothing is left to train.
    """
    if not isinstance(model, nn.Module):
        raise InvalidOptionError(
            f"The first argument is a {type(model).__name__}: pass the model itself (a torch.nn.Module), whose layers "
            "are to be captured; narrow the parameters with params=."
        )
    named: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if params is not None:
        wanted = {id(p) for p in params}
        strangers = len(wanted - {id(p) for p in named.values()})
        if strangers:
            raise InvalidOptionError(
                f"{strangers} of the tensors in params are no trainable parameters of {type(model).__name__}: "
                "pass some of model.parameters(), with requires_grad set."
            )
        named = {name: p for name, p in named.items() if id(p) in wanted}
    if not named:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no trainable parameter: set requires_grad_(True) on some of its parameters."
        )
    return named


def check_rows(rows: Rows) -> list[Tensor]:
    """Check what is to be differentiated.

    Args:
        rows: A tensor, or a mapping of names to tensors.

    Returns:
        The blocks in order: ``[B]``, or ``[B, K]`` with K > 1.

    Raises:
        CaptureError: With the name of the first block that is not a non-empty vector or matrix with a graph.
    """
    named = {"rows": rows} if isinstance(rows, Tensor) else rows
    if not isinstance(named, Mapping) or not named:
        raise CaptureError(
            f"The rows are a {type(rows).__name__}: give a tensor of shape (rows,) or a non-empty dict of such tensors."
        )
    for name, block in named.items():
        if not isinstance(block, Tensor):
            raise CaptureError(f"Block {name!r} is a {type(block).__name__}: give a tensor of shape (rows,).")
        if block.ndim not in {1, 2} or block.numel() == 0:
            raise CaptureError(
                f"Block {name!r} has shape {tuple(block.shape)}: give unreduced values (reduction='none'), one for "
                "each sample in shape (rows,) or K of each in shape (batch, K), with at least one row; of more "
                "dimensions take a mean over all but the batch, or .flatten(1)."
            )
        if not block.requires_grad:
            raise CaptureError(
                f"Block {name!r} is detached from the parameters (requires_grad is False): compute it from the model's "
                "output inside `with capture:` without detach(), item() or no_grad()."
            )
        if not block.is_floating_point():
            raise CaptureError(f"Block {name!r} has dtype {block.dtype}: rows must be real floating-point numbers.")
    return [block.squeeze(1) if block.ndim == 2 and block.shape[1] == 1 else block for block in named.values()]
