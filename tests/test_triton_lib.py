"""The functions that Triton kernels share, where the interpreter needs a workaround."""

from __future__ import annotations

import pytest
import torch

from moekern import _triton

pytestmark = pytest.mark.skipif(
    _triton.unavailable() is not None, reason="neither Triton's interpreter nor a GPU"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casts_round_to_nearest_even(dtype: torch.dtype, generator: torch.Generator) -> None:
    import triton
    import triton.language as tl

    from moekern._triton_lib import round_to

    @triton.jit
    def kernel(x_ptr, y_ptr, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y_ptr + i, round_to(tl.load(x_ptr + i), y_ptr.dtype.element_ty))

    x = torch.randn(1024, generator=generator) * torch.logspace(-4, 4, 1024)
    x[:6] = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.00390625]
    )  # the last is a tie in bf16
    y = torch.empty(1024, dtype=dtype, device=DEVICE)
    kernel[(1,)](x.to(DEVICE), y, 1024)
    torch.testing.assert_close(y.cpu(), x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_accumulate_in_fp32(dtype: torch.dtype, generator: torch.Generator) -> None:
    import triton
    import triton.language as tl

    from moekern._triton_lib import dot

    @triton.jit
    def kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
        i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
        acc = dot(tl.load(a_ptr + i * N + j), tl.load(b_ptr + i * N + j), tl.full([N, N], 1.0, tl.float32))
        tl.store(c_ptr + i * N + j, acc)

    a, b = (torch.randn(32, 32, generator=generator).to(DEVICE, dtype) for _ in range(2))
    c = torch.empty(32, 32, device=DEVICE)
    kernel[(1,)](a, b, c, 32)
    torch.testing.assert_close(c, (a.double() @ b.double() + 1).float(), rtol=1e-5, atol=1e-5)
