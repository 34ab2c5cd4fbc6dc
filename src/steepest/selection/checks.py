"""What a model, its loss, its scope and a path must be for a selection: one clear message each."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from steepest.errors import InvalidOptionError, NonFiniteError, UnsupportedModelError
from steepest.selection.content import Batch

__all__ = ["check_losses", "check_model", "check_path", "check_rows", "described", "scope_names"]

_FLOAT32 = "gradients are compared in float32 at least. Pass a converted copy, copy.deepcopy(model).float()."


def check_model(model: Any) -> None:
    """Refuse what has no parameters in full precision whose use can be seen.

    Args:
        model: What the user gave.

    Raises:
        InvalidOptionError: If it is no module.
        UnsupportedModelError: With the part that cannot be used.
    """
    if not isinstance(model, nn.Module):
        raise InvalidOptionError(f"The model is a {type(model).__name__}: pass a torch.nn.Module.")
    for name, module in model.named_modules():
        where = f"Its part {name!r}" if name else "The model"
        if hasattr(module, "_orig_mod") or isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{where} is compiled or scripted, so its layers cannot be seen: pass the plain model, which a "
                "compiled one holds as _orig_mod and shares its parameters with."
            )
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            raise UnsupportedModelError(f"{where} is a {type(module).__name__}: pass the model within it, its .module.")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise UnsupportedModelError(
                f"Parameter {name!r} is not initialised yet (a lazy module): run one forward pass before."
            )
        if hasattr(parameter, "device_mesh"):  # a DTensor
            raise UnsupportedModelError(
                f"Parameter {name!r} is a DTensor, of which this process holds a part (FSDP): every process needs the "
                "whole model to score samples. Load the gathered state into a plain copy of the model and pass that."
            )
        if parameter.is_floating_point() and parameter.dtype.itemsize < 4:
            raise UnsupportedModelError(f"Parameter {name!r} is {parameter.dtype}, and {_FLOAT32}")
    if next(model.parameters(), None) is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no parameters, so there are no gradients to choose by: pass the model that is "
            "to be trained."
        )


def check_path(name: str, path: Any) -> Path:
    """Refuse what can be the path of no file.

    Args:
        name: What it is the path of, for the message.
        path: What the user gave.

    Returns:
        The path.

    Raises:
        InvalidOptionError: If it is no path, holds a null character, or names a folder by its very form.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str) or "\0" in text or Path(text).name in {"", ".."}:
        raise InvalidOptionError(f"{name}={path!r} names no file: give the path of one, such as 'subset.npz'.")
    return Path(text)


def check_losses(loss_fn: Any, batch_losses: Any) -> None:
    """Refuse all but exactly one of two functions.

    Args:
        loss_fn: Losses of outputs and targets.
        batch_losses: Losses of a model and a batch.

    Raises:
        InvalidOptionError: If there is not exactly one, or it cannot give one loss for each sample.
    """
    if (loss_fn is None) == (batch_losses is None):
        found = "Neither loss_fn nor batch_losses was" if loss_fn is None else "Both loss_fn and batch_losses were"
        raise InvalidOptionError(
            f"{found} given: give loss_fn(outputs, targets) for batches that are pairs (inputs, targets), or "
            "batch_losses(model, batch) for all others."
        )
    for name, function in (("loss_fn", loss_fn), ("batch_losses", batch_losses)):
        if function is not None and not callable(function):
            raise InvalidOptionError(f"{name} is a {type(function).__name__}: give a function that returns losses [B].")
    reduction = getattr(loss_fn, "reduction", "none")
    if reduction != "none":
        raise InvalidOptionError(
            f"loss_fn is a {type(loss_fn).__name__} with reduction={reduction!r}, one number for the whole batch: "
            "build it with reduction='none'."
        )


def scope_names(model: nn.Module, scope: Any) -> tuple[str, ...]:
    """Find the trainable parameters of a scope that needs no batch to be found.

    Args:
        model: The model.
        scope: "all", or names of modules.

    Returns:
        Their qualified names, in the model's order.

    Raises:
        InvalidOptionError: If a module does not exist, or has nothing to train.
    """
    names = (scope,) if isinstance(scope, str) else scope
    if not isinstance(names, (tuple, list)) or not names or not all(isinstance(name, str) for name in names):
        raise InvalidOptionError(f"scope={scope!r}: give 'last', 'all', or a tuple of names of modules.")
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted: set[int] = set()
    for name in names:
        module = model if names == ("all",) else modules.get(name)
        if module is None:
            near = get_close_matches(name, [known for known in modules if known], n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise InvalidOptionError(
                f"scope={scope!r}: {type(model).__name__} has no module {name!r}; {hint}"
                "Give 'last', 'all', or names that model.named_modules() lists."
            )
        trainable = [id(p) for p in module.parameters() if p.requires_grad]
        if not trainable:
            whole = type(module).__name__ if names == ("all",) else repr(name)
            state = "frozen" if any(True for _ in module.parameters()) else "without parameters"
            remedy = "set requires_grad_(True) on them" if state == "frozen" else "give one that has some"
            raise InvalidOptionError(
                f"scope={scope!r}: {whole} is {state}, and gradients in trainable parameters are what selection looks "
                f"at; {remedy}."
            )
        wanted.update(trainable)
    return tuple(name for name, p in model.named_parameters() if id(p) in wanted)


def check_rows(losses: Any, batch: Batch) -> None:
    """Refuse losses that are not one finite number for each sample.

    Args:
        losses: What the user's function returned.
        batch: The batch.

    Raises:
        InvalidOptionError: If they are not ``[B]``.
        NonFiniteError: With the position of the first sample whose loss is not finite.
    """
    if not isinstance(losses, Tensor) or losses.shape != (len(batch),):
        found = f"of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        reduced = isinstance(losses, Tensor) and losses.ndim == 0
        remedy = (
            "it is reduced over the batch; use reduction='none'"
            if reduced
            else "use reduction='none', and average over everything but the batch, as in losses.flatten(1).mean(1)"
        )
        raise InvalidOptionError(
            f"The loss of a batch of {len(batch)} is {found}: give one loss for each sample, [{len(batch)}]; {remedy}."
        )
    bad = ~losses.detach().isfinite()
    if bad.any():
        position = int(batch.indices[bad.cpu()][0])
        raise NonFiniteError(
            f"The loss of sample {position} is {losses.detach()[bad][0].item()}, the first of {int(bad.sum())} in its "
            "batch that are not finite: remove or mend that sample, or look at the model's weights."
        )


def described(content: Any) -> str:
    """Say what a batch is, for messages."""
    if hasattr(content, "keys"):
        return f"a {type(content).__name__} with the keys {', '.join(map(repr, content))}"
    if isinstance(content, (list, tuple)):
        return f"a {type(content).__name__} of {len(content)}"
    return f"a {type(content).__name__}"
