"""Peak memory of an optimizer's steps.

The resident set of the process says little about a small model: the libraries' own start-up is a hundred
times larger. What is measured instead is every byte that torch allocates for tensors, step for step, by
torch's profiler, over a few steps on a copy and outside of the clock.
"""

import os
from collections.abc import Callable

import torch
from torch.autograd.profiler import profile

__all__ = ["memory_kind", "peak_memory"]


def memory_kind(device: str) -> str:
    """What `peak_memory` measures, in words.

    Args:
        device: Torch device of the run.

    Returns:
        The words.
    """
    where = "CUDA" if device.startswith("cuda") else "CPU"
    return f"peak of {where} tensor memory in the first steps, beyond model and data"


def peak_memory(device: str, action: Callable[[], None]) -> int:
    """Peak of the tensor memory that an action allocates, beyond what there was before.

    Library workspaces that do not go through torch's allocators (of BLAS and LAPACK) are not seen.

    Args:
        device: Torch device of the run.
        action: What to measure; it keeps what it allocates as long as it likes.

    Returns:
        Bytes.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        action()
        return int(torch.cuda.max_memory_allocated(device)) - start
    # Kineto, the profiler's library, prints a line at every start and stop unless told not to. This
    # function is only called in processes that exist for one run, so their environment is free to change.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(profile_memory=True) as profiler:
        action()
    results = profiler.kineto_results
    events = [] if results is None else results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    allocated = peak = 0
    for _, change in changes:
        allocated += change
        peak = max(peak, allocated)
    return peak
