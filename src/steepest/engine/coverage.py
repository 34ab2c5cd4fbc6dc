"""What the engine can differentiate, checked module by module before the first forward pass."""

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from steepest.engine.tape import REFERENCE_REMEDY
from steepest.errors import UnsupportedModelError

__all__ = ["check_model"]

_SUPPORTED = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    nn.MultiheadAttention, nn.PReLU, nn.ParameterList, nn.ParameterDict, ParametrizationList,
)  # fmt: skip
_INTERACTING = "samples of the batch interact in it"
# (type, why it cannot work, what to do)
_REFUSED: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str, str], ...] = (
    (
        (nn.RNNBase, nn.RNNCellBase),
        "a recurrent layer uses its weights at every time step inside one fused kernel",
        "build the recurrence from Linear layers",
    ),
    (nn.SyncBatchNorm, _INTERACTING, "use GroupNorm"),
    (
        _ConvTransposeNd,
        "transposed convolutions have no per-sample rule yet",
        "use Upsample followed by Conv",
    ),
    (nn.Bilinear, "it has no per-sample rule", "multiply the inputs and use Linear"),
    (nn.EmbeddingBag, "it sums tokens inside one kernel", "use Embedding and sum its output"),
)


def check_model(model: nn.Module, names: Collection[str]) -> None:
    """Refuse a model that holds parameters without an exact per-sample rule.

    Args:
        model: The model.
        names: Qualified names of the parameters to differentiate.

    Raises:
        UnsupportedModelError: With the qualified name of the first offender and the remedy.
    """
    for prefix, module in model.named_modules():
        path = f"{prefix}." if prefix else ""
        own = {f"{path}{name}": p for name, p in module.named_parameters(recurse=False)}
        trained = {name: p for name, p in own.items() if name in names}
        for name, parameter in trained.items():
            _check_parameter(name, parameter)
        _check_module(prefix or type(model).__name__, module, bool(trained))


def _check_parameter(name: str, parameter: torch.Tensor) -> None:
    if isinstance(parameter, UninitializedParameter):
        why, remedy = "is not initialised yet (a lazy module)", "run one forward pass before"
    elif parameter.is_complex():
        why, remedy = "is complex", "store real and imaginary part as two real parameters"
    elif parameter.layout is not torch.strided:
        why, remedy = f"has layout {parameter.layout}", "use a dense parameter"
    elif not parameter.is_floating_point():
        why, remedy = f"has dtype {parameter.dtype}", "use a floating-point parameter"
    else:
        return
    raise UnsupportedModelError(f"Parameter {name!r} {why}. Remedy: {remedy}, {REFERENCE_REMEDY}.")


def _check_module(name: str, module: nn.Module, trained: bool) -> None:
    kind = type(module).__name__
    reason: tuple[str, str] | None = None
    if hasattr(module, "_orig_mod") or isinstance(module, (torch.jit.ScriptModule, nn.DataParallel)):
        reason = (
            "its calls run outside the Python functions that the capture sees",
            "pass the plain module (_orig_mod of a compiled one, .module of DataParallel, the one before scripting)",
        )
    elif isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        reason = (
            "in training mode it normalises by the statistics of the batch, so samples interact",
            "call .eval() on it to use running statistics, replace it by GroupNorm",
        )
    elif not trained:
        return
    elif isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        option = "max_norm" if module.max_norm is not None else "scale_grad_by_freq"
        reason = (f"{option} makes its gradient depend on the whole batch", f"build it without {option}")
    elif isinstance(module, nn.MultiheadAttention) and module.bias_k is not None:
        reason = ("add_bias_kv repeats a parameter for every sample", "build it with add_bias_kv=False")
    else:
        reason = next(((why, remedy) for types, why, remedy in _REFUSED if isinstance(module, types)), None)
        from_torch = type(module).__module__.startswith("torch.nn.")
        if reason is None and from_torch and not isinstance(module, _SUPPORTED):
            reason = ("it has no per-sample rule", "build it from Linear, Conv, Embedding and norm layers")
    if reason is not None:
        raise UnsupportedModelError(
            f"Layer {name!r} ({kind}) is not supported: {reason[0]}. Remedy: {reason[1]}, {REFERENCE_REMEDY}."
        )
