"""LPSGD and LPSGDM with fused=True: the compiled pass against the plain one."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch.optim import Optimizer

import steepest as st

# Every dtype and optimizer is compiled once, in ten seconds.
CASES = [
    (st.LPSGDM, torch.float32),
    pytest.param(st.LPSGDM, torch.float64, marks=pytest.mark.slow),
    pytest.param(st.LPSGD, torch.float32, marks=pytest.mark.slow),
]
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")


def grown(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    large = [(8192,), (90, 100), (9001,), (9001,), (9001,), (30, 20, 15), (10_007,), (11, 1021), (200_000,), (9017,)]
    shapes = [(), (1,), (4, 5), (1001,), (8, 0), *large]
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    made.append(torch.randn(2, 30, 40, 50, generator=generator, dtype=dtype).to(memory_format=torch.channels_last))
    params = [torch.nn.Parameter(tensor) for tensor in made]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=dtype).to(memory_format=torch.preserve_format)
    return params


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_the_compiled_pass_moves_as_the_plain_one(kind: Callable[..., Optimizer], dtype: torch.dtype) -> None:
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    for options in ({"p": 4.0}, {"p": 2.5, "maximize": True, "lr": 0.3, "eps": 1e-4, "weight_decay": 0.1}, {"p": 2.0}):
        a, b = grown(dtype), grown(dtype)
        fused, plain = kind(a, fused=True, **options), kind(b, **options)
        for _ in range(4):
            fused.step()
            plain.step()
            for opt in (fused, plain):  # as schedules do
                opt.param_groups[0]["lr"] *= 0.9
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, **tolerance)
            if options["p"] == 2:
                assert torch.equal(x, y)


def test_it_is_compiled_once_whatever_the_shapes() -> None:
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in ([8192], [9000] * 3, list(range(8190, 8210)), [70_000] * 9):
            params = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
            for param in params:
                param.grad = torch.ones_like(param)
            st.LPSGDM(params, lr=0.1, p=3.0, fused=True).step()
            assert all(bool((param < 1).all()) for param in params)
