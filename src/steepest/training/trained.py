"""A trained model as a file that `torch.load(..., weights_only=True)` reads."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steepest.training.data import Splits
from steepest.training.files import write_atomically
from steepest.training.spec import RunSpec
from steepest.training.task import Task

__all__ = ["save_model", "write_tensors"]


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Save tensors and plain values so that the file is either complete or absent.

    Args:
        path: Where to.
        content: What `torch.load` gives back with `weights_only=True`.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def save_model(path: Path, spec: RunSpec, task: Task, model: nn.Module, splits: Splits) -> None:
    """Save what one needs to use a model: its state, the scaling of inputs and targets, the names of both.

    Args:
        path: Where to.
        spec: The run that trained it.
        task: Its task.
        model: The model.
        splits: The data that it was trained on.
    """
    shape = splits.shape
    write_tensors(
        path,
        {
            "state_dict": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
            "scaling": dict(splits.scaling),
            "task": spec.task,
            "model": spec.origin().model,
            "input_shape": list(shape.inputs),
            "outputs": shape.outputs,
            "features": list(task.features),
            "classes": list(task.classes),
        },
    )
