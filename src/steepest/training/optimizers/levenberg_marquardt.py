"""Levenberg-Marquardt on the whole training split, from the package torch-levenberg-marquardt."""

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steepest._validation import check_choice, check_integer, check_real
from steepest.errors import ClosureError, InvalidOptionError
from steepest.training.losses import CrossEntropy, Loss
from steepest.training.optimizer import Diagnosis, OptimizerEntry
from steepest.training.rivals import keep_lr, load, remember_lr

_NAME = "torch_levenberg_marquardt"
# A step factorises a dense matrix as large as rows or parameters, whichever are fewer: beyond this it takes minutes.
_MOST = 10_000

Batch = tuple[Loss, Tensor, Tensor]


class LevenbergMarquardt(Optimizer):
    """The package's `LevenbergMarquardtModule` as an optimizer: damping up until the loss falls, then down.

    Args:
        model: The model; its parameters become views of one tensor.
        lr: Fraction of the solution that is taken; the schedule of the run does not change it.
        damping: Where the damping begins; it is added to ``J^T J / B`` or ``J J^T / B``.
        damping_mode: "standard" adds a multiple of the identity, "adaptive" one times the largest number of the
            diagonal, "fletcher" the diagonal itself.
        attempts: Dampings that a step tries; the last one is taken even if the loss does not fall.
        solver: How the damped system is solved.
        rows: "residuals" for losses that are sums of squares, "roots" for the square root of every sample's loss, as
            the package does it for cross-entropy.
        chunk: Samples that the Jacobian is formed of at a time; None for all.

    Raises:
        InvalidOptionError: If an option is impossible.
        MissingPackageError: If the package is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1.0,
        damping: float = 1e-3,
        damping_mode: Literal["standard", "adaptive", "fletcher"] = "standard",
        attempts: int = 10,
        solver: Literal["qr", "cholesky", "solve"] = "cholesky",
        rows: Literal["residuals", "roots"] = "residuals",
        chunk: int | None = 4096,
    ) -> None:
        check_real("lr", lr, low=0)
        check_real("damping", damping, low=0, open_low=True)
        check_choice("damping_mode", damping_mode, ("standard", "adaptive", "fletcher"))
        check_integer("attempts", attempts, low=1)
        check_choice("solver", solver, ("qr", "cholesky", "solve"))
        check_choice("rows", rows, ("residuals", "roots"))
        if chunk is not None:
            check_integer("chunk", chunk, low=1)
        training = load(f"{_NAME}.training", "torch-levenberg-marquardt", "Levenberg-Marquardt", _without_lightning)
        super().__init__(model.parameters(), {"lr": lr, "damping": float(damping), "attempts": 0})
        remember_lr(self)
        self._rows = _Rows(rows)
        self._module = training.LevenbergMarquardtModule(
            model,
            loss_fn=self._rows,
            damping_strategy=training.StandardDampingStrategy(starting_value=damping, damping_mode=damping_mode),
            attempts_per_step=attempts,
            solve_method=solver,
            max_batch_size=chunk,
        )
        self._fits = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Batch] | None = None) -> Tensor:  # type: ignore[override]
        """Take a step on a batch.

        Args:
            closure: Returns the loss, the inputs and the targets: the package evaluates the model itself.

        Returns:
            The mean loss before the step.

        Raises:
            ClosureError: If there is no closure.
            InvalidOptionError: If the loss has no residuals, or too many for the model.
        """
        if closure is None:
            raise ClosureError("LevenbergMarquardt.step() needs a closure that returns (loss, inputs, targets).")
        loss, inputs, targets = closure()
        if self._rows.kind == "residuals" and isinstance(loss, CrossEntropy):
            raise InvalidOptionError(
                "rows='residuals' was asked for with a cross-entropy loss: it is no sum of squares; use rows='roots'"
            )
        self._rows.loss = loss
        self._check_size(inputs, targets)
        group = self.param_groups[0]
        strategy = self._module.damping_strategy
        # What lasts from step to step lives in the group, so that a checkpoint has it.
        strategy.damping_factor = torch.tensor(group["damping"])
        self._module.learning_rate = group["lr"]
        # Parameters that were loaded since the last step are what a rejected step goes back to.
        self._module.backup_parameters()
        before = self._first(inputs, targets)
        _, _, _, logs = self._module.training_step(inputs, targets)
        group["damping"] = float(strategy.damping_factor)
        group["attempts"] = int(logs["attempts"])
        return before

    def _first(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._rows(self._module.forward(inputs), targets)

    def _check_size(self, inputs: Tensor, targets: Tensor) -> None:
        if self._fits:
            return
        numbers = sum(param.numel() for group in self.param_groups for param in group["params"])
        rows = len(inputs) * self._rows.residuals(self._module.model(inputs[:1]), targets[:1]).numel()
        if min(numbers, rows) > _MOST:
            raise InvalidOptionError(
                f"{rows} residuals and {numbers} parameters: every attempt of a step would factorise a dense matrix "
                f"of {min(numbers, rows)} rows, and {_MOST} are the most; use a smaller model or another optimizer"
            )
        self._fits = True


class _Rows:
    """A loss of steepest in the package's form."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.loss: Any = None

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mean: Tensor = self.loss.per_sample(outputs, targets).mean()
        return mean

    def residuals(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One row of residuals for each sample."""
        if self.kind == "residuals":
            found: Tensor = self.loss.residuals(outputs, targets)
        else:
            losses = self.loss.per_sample(outputs, targets)
            # A loss of zero is met: its row is zero, where the root's derivative would be infinite.
            found = torch.where(losses > 0, torch.where(losses > 0, losses, 1).sqrt(), 0)
        return found.reshape(len(outputs), -1)


def _without_lightning(module: str) -> ModuleType:
    """Import a part of the package that needs torch alone.

    The package's own `__init__` also imports its helpers for Lightning, and with them Lightning and torchmetrics.

    Args:
        module: Its full name.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: If the package is not installed.
    """
    if _NAME in sys.modules:
        return importlib.import_module(module)
    spec = find_spec(_NAME)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {_NAME!r}", name=_NAME)
    sys.modules[_NAME] = module_from_spec(spec)
    try:
        return importlib.import_module(module)
    finally:
        # An import of the package by somebody else must run its `__init__`.
        for name in [name for name in sys.modules if name == _NAME or name.startswith(f"{_NAME}.")]:
            del sys.modules[name]


def _batch_step(optimizer: Optimizer, model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> Tensor:
    del model  # the optimizer has it
    step: Callable[[Callable[[], Batch]], Tensor] = optimizer.step  # type: ignore[assignment]
    return step(lambda: (loss, inputs, targets))


def _diagnose(optimizer: Optimizer) -> Diagnosis:
    group = optimizer.param_groups[0]
    return {"damping": float(group["damping"]), "attempts": float(group["attempts"])}


ENTRIES = [
    OptimizerEntry(
        name="levenberg-marquardt",
        label="Levenberg-Marquardt",
        description="the package torch-levenberg-marquardt on the whole training split: an epoch is one step of up to "
        "10 attempts; compare it by --budget-seconds",
        constructor=lambda: LevenbergMarquardt,
        takes="model",
        step=lambda _options: _batch_step,
        lr_range=(1e-1, 1.0),
        kind_options={"classification": {"rows": "roots"}},
        full_batch=True,
        anneal=keep_lr,
        diagnose=_diagnose,
        colour="#E0103C",
    )
]
