"""The machine and the software of a run, for its record."""

import contextlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import steepest
from steepest._versions import package_version

__all__ = ["cpu_model", "environment_row", "source_commit"]


def cpu_model() -> str:
    """Name of the processor.

    Returns:
        The name as the system gives it, or the architecture.
    """
    with contextlib.suppress(OSError):  # no Linux: the platform module knows the rest
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def source_commit() -> str | None:
    """Commit of steepest's source, if it runs from a git checkout.

    Returns:
        The hash, with "-dirty" if tracked files were changed; None outside a checkout.
    """
    folder = Path(steepest.__file__).parent
    # A virtual environment may lie inside somebody else's checkout: ask whether git knows this very file.
    if _git(folder, "ls-files", "--error-unmatch", "errors.py") is None:
        return None
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    return f"{commit}-dirty" if commit and _git(folder, "status", "--porcelain", "-uno", ".") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment_row(device: str = "cpu", threads: int | None = None) -> dict[str, str | int | None]:
    """What a record says about where it was made.

    Args:
        device: Torch device of the run.
        threads: Threads of torch in the run; None takes those of this process.

    Returns:
        Names and values, ready for JSON.
    """
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "steepest": package_version("steepest"),
        "commit": source_commit(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "gpu": gpu,
        "device": device,
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }
