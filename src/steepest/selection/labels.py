"""Labels: where a batch has them, and what counts as one."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steepest.errors import InvalidOptionError
from steepest.selection.content import LABEL_KEYS

__all__ = ["given_labels", "is_sample", "labels_of"]


def given_labels(labels: Any) -> Tensor:
    """Take labels from the user.

    Args:
        labels: A tensor, an array or a list of whole numbers.

    Returns:
        ``[N]``, int64 on the CPU.

    Raises:
        InvalidOptionError: If they are anything else.
    """
    try:
        with torch.device("cpu"):
            tensor = torch.as_tensor(np.array(labels) if isinstance(labels, np.ndarray) else labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidOptionError(f"labels is no array of numbers ({error}): give whole numbers, [N].") from error
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex():
        raise InvalidOptionError(
            f"labels has shape {tuple(tensor.shape)} and dtype {tensor.dtype}: give one whole number for each sample, "
            "[N]; number classes that have names."
        )
    return tensor.to(torch.int64)


def labels_of(content: Any, size: int) -> Tensor | None:
    """Find the labels in a batch: its second item, or the one under a usual key.

    Args:
        content: The batch.
        size: Samples in it.

    Returns:
        ``[B]``, int64 on the CPU; None where that item is anything but one whole number for each sample.
    """
    found = _target(content)
    if isinstance(found, np.ndarray) and found.dtype.kind in "biu":
        found = torch.from_numpy(np.array(found))
    if not isinstance(found, Tensor) or found.shape != (size,) or found.is_floating_point() or found.is_complex():
        return None
    return found.detach().cpu().to(torch.int64)


def is_sample(content: Any) -> bool:
    """Tell a single sample from a batch, by a label that is a single number."""
    label = _target(content)
    return isinstance(label, (int, float, np.generic)) or (isinstance(label, Tensor) and label.ndim == 0)


def _target(content: Any) -> Any:
    if isinstance(content, Mapping):
        return next((content[key] for key in LABEL_KEYS if key in content), None)
    return content[1] if isinstance(content, (list, tuple)) and len(content) > 1 else None
