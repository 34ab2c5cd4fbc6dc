"""Every test starts from one seed and must leave no hook, no mode and no changed global setting behind."""

from __future__ import annotations

import gc
import os
import re
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_globals
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# Time limits per example measure the machine's other work, not the code.
hypothesis.settings.register_profile("steepest", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steepest")
# A shell that runs this in the background leaves Ctrl-C ignored, here and in every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

MODULE_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
MODULES: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _tracked(method: Callable[..., None]) -> Callable[..., None]:
    def wrapper(self: nn.Module, *args: object, **kwargs: object) -> None:
        method(self, *args, **kwargs)
        MODULES.add(self)

    return wrapper


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The tensors are tiny: on a shared machine a second thread costs four times what it gives."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _track_modules() -> Iterator[None]:
    """Note every module made by a constructor, a deepcopy or a pickle: cheaper than a walk over the heap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__init__", _tracked(nn.Module.__init__))
        patch.setattr(nn.Module, "__setstate__", _tracked(nn.Module.__setstate__))
        yield


def leftover_hooks() -> list[str]:
    """Every hook on a living module, on its parameters, or on all modules."""
    found = [f"every module: {n}" for n, v in vars(module_globals).items() if n.startswith("_global_") and v]
    for module in list(MODULES):
        state = vars(module)
        found += [f"{type(module).__name__}.{name}" for name in MODULE_HOOKS if state.get(name)]
        for name, parameter in state.get("_parameters", {}).items():
            if parameter is not None:
                found += [f"{type(module).__name__}.{name}.{h}" for h in TENSOR_HOOKS if getattr(parameter, h, None)]
    return found


def global_state() -> dict[str, object]:
    """The settings that code under test could change for everybody."""
    return {
        "function modes": _get_current_function_mode_stack(),
        "dispatch modes": _get_current_dispatch_mode_stack(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "saved tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "hooks": leftover_hooks(),
    }


REMEDY = re.compile(
    r"ReferenceCapture|GroupNorm|eval\(\)|instead|\b(use|call|return|pass|set|remove|freeze|replace|switch|run|give|make|keep|"
    r"create|compute|build|capture|unwrap|write|move|initiali[sz]e)\b",
    re.IGNORECASE,
)


@pytest.fixture
def teaches() -> Callable[[Exception], None]:
    """Assert that an error says what to do."""

    def check(error: Exception) -> None:
        assert REMEDY.search(str(error)), f"no remedy in: {error}"

    return check


@pytest.fixture
def world() -> Callable[[], dict[str, object]]:
    """Read the global state in the middle of a test."""
    return global_state


@pytest.fixture(autouse=True)
def _clean_world() -> Iterator[None]:
    before = global_state()
    torch.manual_seed(0)
    yield
    if leftover_hooks():
        gc.collect()  # lazy modules carry a hook of torch's own: those of finished tests go first
    after = global_state()
    changed = {name: (before[name], value) for name, value in after.items() if value != before[name]}
    assert not changed, f"global state changed (before, after): {changed}"


@pytest.fixture(scope="session")
def steepest_data() -> Path:
    """The folder of downloaded data sets, for tests on real data."""
    folder = os.environ.get("STEEPEST_DATA")
    if not folder:
        pytest.skip("STEEPEST_DATA is not set: it names the folder of the downloaded data sets")
    path = Path(folder)
    if not path.is_dir():
        pytest.skip(f"STEEPEST_DATA={folder} is not a folder")
    return path
