"""A model held fixed: eval mode, frozen outside the scope, and per-sample rows batch by batch."""

import contextlib
import hashlib
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from steepest.engine.capture import Capture
from steepest.engine.scope import last_layer
from steepest.errors import CaptureError, InvalidOptionError, UnsupportedModelError
from steepest.selection.checks import check_losses, check_model, check_rows, described, scope_names
from steepest.selection.content import tensor_bytes, to_device
from steepest.selection.method import Rows, Scope
from steepest.selection.samples import Batch

__all__ = ["BatchLosses", "FixedModel", "LossFn"]

LossFn = Callable[[Any, Any], Tensor]
BatchLosses = Callable[[nn.Module, Any], Tensor]


class FixedModel:
    """Hold a model fixed and differentiate the losses of its samples.

    Inside ``with`` the model is in eval mode, parameters outside the scope require no gradient (so no graph is built
    for them), and modules compiled in place run as they were written. On exit, after an error too, all of that and
    torch's random state are as they were. No ``.grad`` is touched, no hook registered. Losses are computed with
    autocast switched off.

    Args:
        model: The model, whose parameters are float32 or float64. Batches are moved to the device of its first one.
        scope: "last" (the last layer with a weight that the model calls, found on the first batch), "all" (every
            trainable parameter), or qualified names of modules.
        loss_fn: ``loss_fn(outputs, targets)``, the losses ``[B]`` of batches that are pairs (inputs, targets).
        batch_losses: ``batch_losses(model, batch)``, the losses ``[B]`` of batches of any form.

    Raises:
        InvalidOptionError: If the scope names no module with parameters to train, or not exactly one loss is given.
        UnsupportedModelError: If the model is compiled or wrapped, in half precision, or has no parameters.

    Example:
        >>> import torch
        >>> from steepest.selection.samples import Samples
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> samples = Samples((torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])))
        >>> with FixedModel(model, "last", torch.nn.CrossEntropyLoss(reduction="none")) as fixed:
        ...     rows = [fixed.rows(batch) for batch in samples.batches()]
        >>> rows[0].jacobian.names
        ('2.weight', '2.bias')
    """

    def __init__(
        self,
        model: nn.Module,
        scope: Scope = "last",
        loss_fn: LossFn | None = None,
        batch_losses: BatchLosses | None = None,
    ) -> None:
        check_model(model)
        check_losses(loss_fn, batch_losses)
        self._model, self._scope = model, scope
        self._loss_fn, self._batch_losses = loss_fn, batch_losses
        self._names = None if scope == "last" else scope_names(model, scope)
        self._device = next(model.parameters()).device
        self._capture: Capture | None = None
        self._last = ""
        self._undo: contextlib.ExitStack | None = None

    def __repr__(self) -> str:
        return f"FixedModel({type(self._model).__name__}, scope={self._scope!r}, device={self._device})"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all parameters and buffers with their names, dtypes and shapes, worked out anew at every call."""
        state = hashlib.sha256()
        for kind, named in (("p", self._model.named_parameters()), ("b", self._model.named_buffers())):
            for name, tensor in named:
                state.update(f"{kind} {name} {tensor.dtype} {tuple(tensor.shape)};".encode())
                state.update(tensor_bytes(tensor))
        return state.hexdigest()

    def __enter__(self) -> Self:
        """Hold the model fixed.

        Returns:
            This object.

        Raises:
            CaptureError: If it is held already.
        """
        if self._undo is not None:
            raise CaptureError("This FixedModel holds its model already: leave its `with` block first.")
        with contextlib.ExitStack() as stack:  # undone at once if anything below fails
            stack.callback(_restore_state(self._model))
            stack.enter_context(torch.random.fork_rng([self._device] if self._device.type == "cuda" else []))
            self._model.eval()
            for module in self._model.modules():
                module._compiled_call_impl = None
            if self._names is not None:
                self._freeze(self._names)
            self._undo = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put everything back."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.__exit__(kind, error, trace)

    def rows(self, batch: Batch) -> Rows:
        """Compute the losses of a batch, and their Jacobian in the parameters of the scope.

        Args:
            batch: Some samples.

        Returns:
            The rows, one for each sample.

        Raises:
            CaptureError: If the model is not held fixed, or the losses depend on nothing in the scope.
            InvalidOptionError: If the batch is no pair and there is no ``batch_losses``, or the losses are not ``[B]``.
            NonFiniteError: If a loss is NaN or infinite.
            UnsupportedModelError: If samples interact, or the scope holds a layer without an exact rule.
        """
        if self._undo is None:
            raise CaptureError("The model is not held fixed: call rows() inside `with FixedModel(...) as fixed:`.")
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            content = to_device(batch.content, self._device)
            capture = self._capture or self._settle(content)
            with capture:
                losses = self._losses(content)
            check_rows(losses, batch)
            if not losses.requires_grad:
                raise CaptureError(
                    "The losses are detached from the parameters that are looked at: compute them from the model's "
                    "outputs without detach(), item() or no_grad(), and name a scope that the outputs depend on."
                )
            jacobian = capture.jacobian(losses)
        return Rows(batch.indices, batch.labels, losses.detach(), jacobian, self._last)

    def _losses(self, content: Any) -> Tensor:
        if self._batch_losses is not None:
            return self._batch_losses(self._model, content)
        if self._loss_fn is None or not isinstance(content, (tuple, list)) or len(content) != 2:
            raise InvalidOptionError(
                f"A batch is {described(content)}, and loss_fn takes pairs (inputs, targets) only: give batch_losses "
                "instead, a function of the model and the batch that returns the losses [B]."
            )
        inputs, targets = content
        return self._loss_fn(self._model(inputs), targets)

    def _settle(self, content: Any) -> Capture:
        """Find the scope on the first batch, where it takes one, and the last layer in it."""
        if self._names is None:
            self._names = self._find_last(content)
            self._last = self._names[0]
            self._freeze(self._names)
        else:
            # A scope of norms or bare parameters has no such layer: methods that need one say so.
            with contextlib.suppress(UnsupportedModelError):
                self._last = last_layer(self._model, lambda: self._losses(content))[0]
        self._capture = Capture(self._model, params=[p for p in self._model.parameters() if p.requires_grad])
        return self._capture

    def _find_last(self, content: Any) -> tuple[str, ...]:
        """Find the last layer among all layers: a frozen one is refused, and no other taken in its place."""
        named = dict(self._model.named_parameters())
        frozen = {name for name, p in named.items() if not p.requires_grad and p.is_floating_point()}
        for name in frozen:
            named[name].requires_grad_(True)
        try:
            names = last_layer(self._model, lambda: self._losses(content))
        finally:
            for name in frozen:
                named[name].requires_grad_(False)
        if names[0] in frozen:
            raise InvalidOptionError(
                f"scope='last' means the last layer that the model calls, whose weight {names[0]!r} is frozen: set "
                "requires_grad_(True) on it, or name the modules to look at, as in scope=('encoder',)."
            )
        return tuple(name for name in names if name not in frozen)

    def _freeze(self, names: tuple[str, ...]) -> None:
        kept = set(names)
        for name, parameter in self._model.named_parameters():
            if name not in kept:
                parameter.requires_grad_(False)


def _restore_state(model: nn.Module) -> Callable[[], None]:
    """Note what holding a model fixed changes."""
    modules = [(module, module.training, module._compiled_call_impl) for module in model.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for module, training, compiled in modules:  # train() of a module may do more than set its flag
            module.training, module._compiled_call_impl = training, compiled
        for parameter, requires_grad in grads:
            parameter.requires_grad_(requires_grad)

    return restore
