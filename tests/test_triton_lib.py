"""The functions that Triton kernels share, where the interpreter needs a workaround."""

from __future__ import annotations

import pytest
import torch

from moekern import _triton

if _triton.unavailable() is not None:
    pytest.skip("neither Triton's interpreter nor a GPU", allow_module_level=True)

import triton
import triton.language as tl

from moekern._triton_lib import dot, round_to

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@triton.jit
def _round_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, round_to(tl.load(x_ptr + i), y_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    acc = dot(tl.load(a_ptr + i * N + j), tl.load(b_ptr + i * N + j), tl.full([N, N], 1.0, tl.float32))
    tl.store(c_ptr + i * N + j, acc)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casts_round_to_nearest_even(dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(1024, generator=generator) * torch.logspace(-4, 4, 1024)
    x[:6] = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.00390625]
    )  # the last is a tie in bf16
    y = torch.empty(1024, dtype=dtype, device=DEVICE)
    _round_kernel[(1,)](x.to(DEVICE), y, 1024)
    torch.testing.assert_close(y.cpu(), x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_accumulate_in_fp32(dtype: torch.dtype, generator: torch.Generator) -> None:
    a, b = (torch.randn(32, 32, generator=generator).to(DEVICE, dtype) for _ in range(2))
    c = torch.empty(32, 32, device=DEVICE)
    _dot_kernel[(1,)](a, b, c, 32)
    torch.testing.assert_close(c, (a.double() @ b.double() + 1).float(), rtol=1e-5, atol=1e-5)
