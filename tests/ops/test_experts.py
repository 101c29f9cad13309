"""The expert ops together: what one row's bits depend on, the same numbers by every route, sizes that cross the kernels'
blocks, and the errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import ISAS, cpu_isa
from torch import Tensor

from moekern import _op
from moekern.ops import SPECS, combine, fused_experts, gate, grouped_gemm, route
from moekern.ops.fused_experts import ref
from moekern.ops.fused_experts.cases import GPT_OSS, make_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE = _op.unavailable(SPECS["fused_experts"].backends["cpu"]) is None
needs_native = pytest.mark.skipif(not NATIVE, reason="the native library is not built")


def arguments_of(num_tokens: int, dtype: torch.dtype, **kwargs: Any) -> dict[str, Any]:
    make = make_case(num_tokens, 3, 2, 80, 56, **kwargs)
    return make(torch.Generator().manual_seed(7), dtype, torch.device("cpu"))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Any:
    with cpu_isa(request.param) as used:
        if used != request.param:
            pytest.skip(f"{request.param} cannot run here")
        yield used


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True, **GPT_OSS}], ids=["silu", "gpt_oss"])
def test_a_pair_row_does_not_depend_on_the_others(
    isa: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """300 tokens take the path of many rows (about 200 an expert), the subsets those of a few and of one."""
    arguments = {**arguments_of(300, dtype, **options), "reduce": False, "backend": "cpu"}
    whole = fused_experts(**arguments).unflatten(0, (300, 2))
    for kept in (150, 40, 9, 1):
        tokens = torch.arange(kept) * (300 // kept)
        alone = {n: arguments[n][tokens] for n in ("x", "ids", "weights")}
        part = fused_experts(**{**arguments, **alone}).unflatten(0, (kept, 2))
        assert torch.equal(part, whole[tokens]), f"{kept} tokens on their own"
        skipped = torch.full_like(arguments["ids"], -1)
        skipped[tokens] = arguments["ids"][tokens]
        masked = fused_experts(**{**arguments, "ids": skipped}).unflatten(0, (300, 2))
        assert torch.equal(masked[tokens], whole[tokens]), f"{kept} tokens among skipped ones"
        assert masked.count_nonzero() == whole[tokens].count_nonzero(), "skipped rows must be 0"


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 11, 130])
def test_the_separate_ops_give_the_same_bits(isa: str, dtype: torch.dtype, num_tokens: int) -> None:
    a = arguments_of(num_tokens, dtype, outside=True, bias=True)
    perm, offsets, _ = route(a["ids"], 3, backend="cpu")
    token = torch.where(perm < 0, -1, perm // 2).int()
    h = grouped_gemm(a["x"], a["w_gate_up"], offsets, gather=token, bias=a["b_gate_up"], activation="silu", gated=True,
                     backend="cpu")  # fmt: skip
    y = grouped_gemm(h, a["w_down"], offsets, bias=a["b_down"], backend="cpu")
    rows = torch.full_like(y, float("nan"))  # what belongs to no expert is never read
    valid = perm[: offsets[-1]].long()
    rows[valid] = y[: offsets[-1]]
    out = combine(rows, a["weights"], ids=a["ids"], num_experts=3, backend="cpu")
    assert torch.equal(out, fused_experts(**a, backend="cpu"))


@needs_native
def test_transposed_weights_give_the_same_bits(isa: str) -> None:
    a = arguments_of(50, torch.bfloat16)
    turned = {n: a[n].transpose(1, 2).contiguous() for n in ("w_gate_up", "w_down")}
    expected = fused_experts(**a, backend="cpu")
    assert torch.equal(fused_experts(**{**a, **turned}, transposed=True, backend="cpu"), expected)


@needs_native
@pytest.mark.parametrize("num_tokens", [1100, 1700])
def test_more_rows_than_a_segment_or_a_group_holds(num_tokens: int) -> None:
    """One expert has more than 512 rows and all together more than the 1536 slots of a group."""
    make = make_case(num_tokens, 3, 2, 64, 40, distinct=False)
    a = make(torch.Generator().manual_seed(3), torch.float32, torch.device("cpu"))
    a["ids"].view(-1)[: num_tokens // 2] = 1
    torch.testing.assert_close(
        fused_experts(**a, backend="cpu"), ref.fused_experts(**a), rtol=1e-4, atol=1e-5
    )


@needs_native
def test_weights_next_to_unreadable_values() -> None:
    """Rows and columns beside a slice of a larger tensor hold NaN; none may reach a result."""
    a = arguments_of(40, torch.bfloat16)
    for name in ("w_gate_up", "w_down"):
        e, n, d = a[name].shape
        whole = torch.full((e, n + 5, d + 7), float("nan"), dtype=torch.bfloat16)
        whole[:, 2 : 2 + n, 3 : 3 + d] = a[name]
        expected = fused_experts(**a, backend="cpu")
        assert torch.equal(
            fused_experts(**{**a, name: whole[:, 2 : 2 + n, 3 : 3 + d]}, backend="cpu"), expected
        )


@needs_native
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_nan_and_extreme_products(isa: str, activation: str) -> None:
    """NaN stays NaN, large products do not become NaN, and the tail of an activation keeps its relative precision."""
    x = torch.tensor([[float("nan")], [60.0], [-60.0], [-4.0], [-9.0], [1e-6]])
    one = torch.ones(1, 1, 1)
    ids, weights = torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1)
    options: dict[str, Any] = {"activation": activation, "gated": False}
    out = fused_experts(x, one, one, weights, ids, backend="cpu", **options)
    expected = ref.fused_experts(x.double(), one.double(), one.double(), weights.double(), ids, **options)
    assert out[0].isnan()
    torch.testing.assert_close(out[1:].double(), expected[1:], rtol=1e-5, atol=1e-16)


@needs_native
@pytest.mark.parametrize("num_tokens", [3, 70])
def test_gate_scores_the_rounded_logits(isa: str, num_tokens: int) -> None:
    """With logits_dtype=x.dtype the weights come from the rounded logits, as in a router that does not upcast."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(num_tokens, 96, generator=generator).bfloat16()
    weight = torch.randn(24, 96, generator=generator).bfloat16()
    weights, ids, logits = gate(x, weight, 4, logits_dtype=torch.bfloat16, renormalize=True, backend="cpu")
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, x @ weight.t(), rtol=2e-2, atol=2e-2)
    best = logits.float().softmax(-1).gather(-1, ids)
    torch.testing.assert_close(weights, best / best.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert (best.diff(dim=-1) <= 0).all()


def broken(**changes: Any) -> dict[str, Any]:
    a = arguments_of(4, torch.float32)
    for name, change in changes.items():
        a[name] = change(a[name]) if callable(change) else change
    return a


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": zeros(4)}, ValueError, r"x must be \[T, D\]"),
        ({"x": zeros(4, 81)}, ValueError, r"w_down must be \[E, D, F\] = \[\*, 81, \*\]"),
        ({"x": zeros(4, 80, dtype=torch.int64)}, TypeError, "x must be floating"),
        ({"x": zeros(4, 80, dtype=torch.bfloat16)}, TypeError, "w_down must be torch.bfloat16 like x"),
        ({"w_gate_up": zeros(3, 113, 80)}, ValueError, r"w_gate_up must be \[E, 2F, D\] = \[3, 112, 80\]"),
        ({"w_gate_up": zeros(2, 112, 80)}, ValueError, r"= \[3, 112, 80\]; got \[2, 112, 80\]"),
        ({"w_gate_up": zeros(3, 80, 112).transpose(1, 2)}, ValueError, r"contiguous last dimension \(call .contig"),
        ({"w_gate_up": torch.empty(3, 112, 80, device="meta")}, ValueError, "w_gate_up must be on cpu; got meta"),
        ({"ids": zeros(5, 2, dtype=torch.int64)}, ValueError, r"ids must be \[T, K\] = \[4, \*\]"),
        ({"ids": zeros(4, 2)}, TypeError, "ids must be int32 or int64"),
        ({"weights": zeros(4, 3)}, ValueError, r"weights must be \[T, K\] = \[4, 2\]"),
        ({"b_down": zeros(3, 81)}, ValueError, r"b_down must be \[E, D\]"),
        ({"b_gate_up": zeros(3, 112, dtype=torch.float64)}, TypeError, "b_gate_up must be torch.float32 like x"),
        ({"activation": "swish"}, ValueError, "activation must be one of none, silu"),
        ({"limit": -1.0}, ValueError, "limit must be positive"),
        ({"activation": "relu", "alpha": 1.7}, ValueError, "alpha applies to silu only"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_experts(**broken(**changes))
