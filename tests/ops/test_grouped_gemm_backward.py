"""The kernels behind the gradients of the expert ops, in the interpreter where there is no GPU: matrices and biases of
gathered rows, activations, sums of rows, and the launch configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import device_of, same_bits
from test_memory import virtual

from moekern import _triton
from moekern.ops.grouped_gemm import config_backward
from moekern.ops.grouped_gemm.activation import ACTIVATIONS, activate, activate_backward

pytest.importorskip("triton")
from moekern.ops.grouped_gemm import triton_backward
from moekern.ops.grouped_gemm.triton_activation_backward import activation_backward

pytestmark = [pytest.mark.skipif(_triton.unavailable() is not None, reason="no Triton")]
if device_of("triton").type == "cuda":
    pytestmark.append(pytest.mark.gpu)


def shrink_tiles(monkeypatch: pytest.MonkeyPatch, splits: int, block_k: int = 16) -> None:
    """Small launch configurations, so that small tensors have several tiles, steps and splits."""

    def dw(*_: Any) -> config_backward.WeightGradConfig:
        return config_backward.WeightGradConfig(32, 16, block_k, splits, 4, 2)

    def rows(*_: Any) -> config_backward.RowsConfig:
        return config_backward.RowsConfig(2, 16, 4, splits)

    monkeypatch.setattr(config_backward, "choose_dw", dw)
    for name in ("choose_activation_backward", "choose_column_sum", "choose_row_sum"):
        monkeypatch.setattr(config_backward, name, rows)


COUNTS = ((0, 0, 40, 0), (16, 0, 16, 16), (17, 15, 0, 0), (0, 33, 1, 34), (48,), (1, 1, 1, 1, 1), (0, 0, 0))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("splits", [2, 3, 7])
def test_splits_cover_every_row_once(
    counts: tuple[int, ...], splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of whole numbers are exact in every order, so a row left out, read twice or of another expert shows. Rows of
    no expert are NaN."""
    shrink_tiles(monkeypatch, splits)
    num_rows = sum(counts)
    offsets = torch.tensor((2, *counts)).cumsum(0).int()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, (num_rows + 5, n), generator=generator).float() for n in (37, 18))
    gather = torch.randint(
        -2, 3 * (num_rows + 5) + 4, (num_rows + 5,), generator=generator, dtype=torch.int32
    )
    outside = torch.arange(num_rows + 5).sub(2).ge(num_rows) | torch.arange(num_rows + 5).lt(2)
    valid = (gather >= 0) & (gather // 3 < num_rows + 5)
    gathered = torch.where(valid[:, None], b[(gather // 3).clamp(0, num_rows + 4).long()], 0)
    scale = torch.randint(1, 5, (3 * (num_rows + 5),), generator=generator).float()
    scales = torch.where(valid, scale[gather.clamp(0, 3 * (num_rows + 5) - 1).long()], 0)[:, None]
    a[outside], gather[outside] = float("nan"), 0
    device = device_of("triton")
    a_, b_, offsets_, gather_, scale_ = (t.to(device) for t in (a, b, offsets, gather, scale))
    plain = triton_backward.weight_gradient(a_, a_, offsets_, torch.float32)
    right = triton_backward.weight_gradient(a_, b_, offsets_, torch.float32, gather=gather_, gather_div=3)
    left = triton_backward.weight_gradient(
        b_, a_, offsets_, torch.float32, gather=gather_, gather_a=True, gather_div=3
    )
    sums = triton_backward.bias_gradient(
        b_, offsets_, torch.float32, gather=gather_, gather_div=3, scale=scale_
    )
    for e in range(len(counts)):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        assert torch.equal(plain[e].cpu(), a[rows].t() @ a[rows])
        assert torch.equal(right[e].cpu(), a[rows].t() @ gathered[rows])
        assert torch.equal(left[e].cpu(), gathered[rows].t() @ a[rows])
        assert torch.equal(sums[e].cpu(), (gathered[rows] * scales[rows]).sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weight_gradients_round_once(dtype: torch.dtype) -> None:
    """Sums of whole numbers are exact until the last rounding."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-9, 10, (50, n), generator=generator).to(dtype) for n in (20, 24))
    offsets = torch.tensor([0, 50], dtype=torch.int32)
    device = device_of("triton")
    found = triton_backward.weight_gradient(a.to(device), b.to(device), offsets.to(device), dtype)
    assert torch.equal(found[0].cpu(), (a.double().t() @ b.double()).to(dtype))


ACTIVATION_CASES = [(a, gated, interleaved, limit) for a in ACTIVATIONS for gated, interleaved in
                    ((True, False), (True, True), (False, False)) for limit in (None, 0.5)]  # fmt: skip


@pytest.mark.parametrize(("activation", "gated", "interleaved", "limit"), ACTIVATION_CASES, ids=str)
def test_activation(activation: str, gated: bool, interleaved: bool, limit: float | None) -> None:
    """Against the definition in fp64, with products at a limit, beside it, and at both zeros; NaN where it has NaN."""
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(9, 2 * 21 if gated else 21, generator=generator) * 2
    special = torch.tensor([0.5, -0.5, 0.50000006, -0.50000006, 0.0, -0.0, 60.0, -60.0, 1e-8, float("nan")])
    if limit is None:
        special = special[
            :-1
        ]  # without a limit the definition has a gradient of 0 for what is neither side of infinity
    z[1, : len(special)], z[2, -len(special) :] = special, special
    dh, scale = torch.randn(9, 21, generator=generator), torch.rand(9, generator=generator) + 0.5
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32)
    index = torch.tensor([4, 6, 0, 1, 2, 8, 5, 3, -1], dtype=torch.int32)
    alpha, up_shift = (1.702 if activation == "silu" else 1.0), (1.0 if gated else 0.0)
    options = (activation, gated, interleaved, limit, alpha, up_shift)
    scaled = scale[index[:8].long(), None].double()
    exact = activate(z.double(), *options)[:8]
    dz_exact = activate_backward(dh[:8].double() * scaled, z[:8].double(), *options)
    device = device_of("triton")
    z, dh, scale, offsets, on_device = (t.to(device) for t in (z, dh, scale, offsets, index))
    d_scale = torch.full((9,), 2.0, device=device)
    dz, h = activation_backward(
        z,
        dh,
        offsets,
        *options,
        scale=scale,
        index=on_device,
        keep_activations=True,
        d_scale=d_scale,
        add=True,
    )
    assert h is not None
    torch.testing.assert_close(dz[:8].cpu().double(), dz_exact, rtol=2e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(h[:8].cpu().double(), exact * scaled, rtol=2e-6, atol=1e-6, equal_nan=True)
    expected = torch.full((9,), 2.0, dtype=torch.float64)
    expected[index[:8].long()] += (exact * dh[:8].cpu().double()).sum(-1)
    torch.testing.assert_close(d_scale.cpu().double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_rows_summed_in_order() -> None:
    """Sources gathered never, once and often; indices outside name none. fp32 sums in the order of the rows."""
    gather = torch.tensor([3, 0, -1, 3, 5, 3, 0, 2**31 - 1, -(2**31)], dtype=torch.int32)
    rows = torch.randn(9, 40, generator=torch.Generator().manual_seed(3)).bfloat16()
    rows[[2, 4, 7, 8]] = float("nan")
    device = device_of("triton")
    found = triton_backward.sum_gathered(rows.to(device), gather.to(device), 5).cpu()
    expected = torch.zeros(5, 40)
    for i, source in enumerate(gather.tolist()):
        if 0 <= source < 5:
            expected[source] += rows[i].float()
    assert torch.equal(found, expected.bfloat16())


def test_pairs_summed_in_order() -> None:
    ids = torch.tensor([[0, 4], [-1, 2], [2**40, -(2**40)]])
    rows = torch.randn(6, 33, generator=torch.Generator().manual_seed(4)).half()
    rows[[1, 2, 4, 5]] = float("nan")
    device = device_of("triton")
    found = triton_backward.sum_pairs(rows.to(device), ids.to(device), 4).cpu()
    assert torch.equal(found, torch.stack((rows[0], rows[3], torch.zeros(33).half())))


if not torch.cuda.is_available():  # virtual memory is the CPU's

    def test_far_rows() -> None:
        """Offsets beyond 2**31 elements."""
        x = virtual(2**21 + 8, 1032)
        gather = torch.tensor([2**21 + 7, 2**21 + 1], dtype=torch.int32)
        x[gather.long()] = torch.randn(2, 1032, generator=torch.Generator().manual_seed(5)).bfloat16()
        dz = torch.randn(2, 24, generator=torch.Generator().manual_seed(6)).bfloat16()
        offsets = torch.tensor([0, 2], dtype=torch.int32)
        near = triton_backward.weight_gradient(dz, x[gather.long()], offsets, torch.bfloat16)
        there = triton_backward.weight_gradient(dz, x, offsets, torch.bfloat16, gather=gather)
        assert same_bits(there, near)
        assert near.any()
        # Strides within int32 whose multiples are not.
        dz = torch.randn(3, 24, generator=torch.Generator().manual_seed(7)).bfloat16()
        offsets = torch.tensor([0, 3], dtype=torch.int32)
        apart = virtual(2**31 + 256).as_strided((3, 24), (2**30 + 64, 1)).copy_(dz)
        near, there = (triton_backward.weight_gradient(v, v, offsets, torch.bfloat16) for v in (dz, apart))
        assert same_bits(there, near)
        sums = [triton_backward.bias_gradient(v, offsets, torch.float32) for v in (dz, apart)]
        assert same_bits(*sums)


@pytest.mark.parametrize("gpu", _triton.PARTS.values(), ids=lambda g: f"sm_{g.capability}")
def test_configurations_fit_every_part(gpu: _triton.Gpu) -> None:
    for num_rows in (0, 1, 4096, 1 << 18):
        for a, b in ((2816, 2048), (2048, 1408), (256, 2048), (128, 128), (33, 7)):
            for element_size in (2, 4):
                picked = config_backward.choose_dw(num_rows, a, b, element_size, gpu)
                every = [picked, *config_backward.candidates_dw(num_rows, a, b, element_size, gpu)]
                assert len(every) <= 31
                for config in every:
                    assert config.shared(element_size) + config_backward.SHARED_MARGIN <= gpu.shared
                # Partials of one launch: at most two fp32 tiles per SM.
                tiles = -(-a // picked.block_a) * -(-b // picked.block_b)
                assert (2 * picked.splits - 2) * tiles <= 2 * gpu.num_sms
