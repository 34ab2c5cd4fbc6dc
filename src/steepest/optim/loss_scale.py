"""What a torch.amp.GradScaler has done to gradients, for optimizers that captured some of them on the way."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from steepest.errors import CaptureError

__all__ = ["captured_scale", "loss_scale"]


def loss_scale(optimizer: Optimizer) -> float | None:
    """Scale of the gradients in ``p.grad``.

    Args:
        optimizer: An optimizer with ``_step_supports_amp_scaling``, in its step.

    Returns:
        The scale, 1 without a scaler; None if the scaler found infinity and the step is to be skipped.
    """
    found_inf, scale = _from_scaler(optimizer)
    if found_inf is None:
        return 1.0
    if bool(found_inf):
        return None
    return 1.0 if scale is None else float(scale)


def captured_scale(optimizer: Optimizer, scaler: Any, scale: float) -> float:
    """Scale of what was captured in the backward: that of ``p.grad`` before anybody unscaled it.

    Args:
        optimizer: As in `loss_scale`.
        scaler: The scaler, if the user named it.
        scale: What `loss_scale` returned.

    Returns:
        The scale.

    Raises:
        CaptureError: If the gradients were unscaled and the scaler is not known.
    """
    found_inf, applied = _from_scaler(optimizer)
    if found_inf is None or applied is not None:
        return scale
    if scaler is None:
        raise CaptureError(
            "scaler.unscale_(opt) was called, so the scale of the captured gradients is not known: pass "
            "grad_scaler=scaler to the optimizer."
        )
    return float(scaler.get_scale())


def _from_scaler(optimizer: Optimizer) -> tuple[Tensor | None, Tensor | None]:
    """What a GradScaler sets for the time of a step: whether it found infinity, and its scale if still applied."""
    # No attributes of the class: the scaler multiplies with one that it finds.
    return getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
