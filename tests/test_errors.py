"""Bad arguments raise, and the message names the op, the argument, what was expected and what was given."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support import make
from torch import Tensor

import moekern
from moekern._op import OpSpec
from moekern.ops import SPECS


def base(spec: OpSpec) -> dict[str, Any]:
    """Good arguments with as many of the tensors as one case has, as the public function takes them."""
    case = max(
        (c for c in spec.cases if c.small),
        key=lambda c: sum(
            isinstance(v, Tensor) and v.numel() > 0 for v in make(spec, c, torch.float32).values()
        ),
    )
    return make(spec, case, torch.float32)


def tensors() -> list[Any]:
    return [
        pytest.param(spec, name, id=f"{spec.name}-{name}")
        for spec in SPECS.values()
        for name, value in base(spec).items()
        if isinstance(value, Tensor)
    ]


def refuse(spec: OpSpec, arguments: dict[str, Any], error: Any, pattern: str) -> None:
    with pytest.raises(error, match=pattern) as raised:
        getattr(moekern.ops, spec.name)(**arguments)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(("spec", "name"), tensors())
def test_wrong_rank(spec: OpSpec, name: str) -> None:
    arguments = base(spec)
    arguments[name] = arguments[name][None, None]
    shape = re.escape(str(list(arguments[name].shape)))
    refuse(spec, arguments, ValueError, rf"^{spec.name}: {name} must be .*\[.+\].*; got {shape}")


@pytest.mark.parametrize(("spec", "name"), tensors())
def test_wrong_dtype(spec: OpSpec, name: str) -> None:
    arguments = base(spec)
    arguments[name] = arguments[name].to(torch.complex64)
    refuse(spec, arguments, TypeError, rf"^{spec.name}: {name} must be .+; got torch\.complex64")


@pytest.mark.parametrize(("spec", "name"), tensors())
def test_wrong_device(spec: OpSpec, name: str) -> None:
    """One tensor elsewhere: the message names an argument, its device and the other one."""
    arguments = base(spec)
    if sum(isinstance(v, Tensor) for v in arguments.values()) == 1:
        pytest.skip("one tensor alone is on no other device than itself")
    arguments[name] = arguments[name].to("meta")
    refuse(spec, arguments, ValueError, rf"^{spec.name}: \w+ must be on (cpu; got meta|meta; got cpu)")


def change(**edits: Any) -> Any:
    """Edits of good arguments: a value, or a function of the good value."""

    def apply(arguments: dict[str, Any]) -> dict[str, Any]:
        return {**arguments, **{n: e(arguments[n]) if callable(e) else e for n, e in edits.items()}}

    return apply


def gating() -> dict[str, Any]:
    return {"logits": torch.randn(4, 12), "top_k": 3}


def gate() -> dict[str, Any]:
    return {"x": torch.randn(4, 32), "weight": torch.randn(12, 32), "top_k": 3}


def grouped() -> dict[str, Any]:
    return {
        "x": torch.randn(5, 32),
        "weight": torch.randn(3, 16, 32),
        "offsets": torch.tensor([0, 2, 2, 5]).int(),
    }


def experts() -> dict[str, Any]:
    return {"x": torch.randn(4, 32), "w_gate_up": torch.randn(3, 48, 32), "w_down": torch.randn(3, 32, 24),
            "weights": torch.rand(4, 2), "ids": torch.randint(0, 3, (4, 2))}  # fmt: skip


def sums() -> dict[str, Any]:
    return {"y": torch.randn(8, 16), "weights": torch.rand(4, 2)}


def decode() -> dict[str, Any]:
    return {"q": torch.randn(2, 1, 4, 24), "latent": torch.randn(2, 20, 32), "k_rope": torch.randn(2, 20, 8),
            "w_kv_b": torch.randn(4 * 32, 32), "scale": 0.1}  # fmt: skip


def paged() -> dict[str, Any]:
    return {**decode(), "latent": torch.randn(6, 16, 32), "k_rope": torch.randn(6, 16, 8),
            "block_table": torch.zeros(2, 3, dtype=torch.int32)}  # fmt: skip


BAD = [
    ("gate_topk", gating, change(top_k=13), r"gate_topk: top_k must be in 1\.\.min\(E, 64\) = 12; got 13"),
    ("gate_topk", gating, change(top_k=0), r"gate_topk: top_k must be in 1\.\.min\(E, 64\) = 12; got 0"),
    ("gate_topk", gating, change(num_groups=5), "gate_topk: num_groups must divide E = 12; got 5"),
    ("gate_topk", gating, change(num_groups=0), "gate_topk: num_groups must divide E = 12; got 0"),
    ("gate_topk", gating, change(num_groups=4, topk_groups=5), r"topk_groups must be in 1\.\.num_groups = 4; got 5"),
    ("gate_topk", gating, change(num_groups=6), "top_k must not exceed the 2 experts of topk_groups groups; got 3"),
    ("gate_topk", gating, change(scoring="argmax"), "gate_topk: scoring must be one of softmax, .*; got 'argmax'"),
    ("gate_topk", gating, change(group_score="sum"), "gate_topk: group_score must be one of max, top2; got 'sum'"),
    ("gate_topk", gating, change(norm_eps=-1.0), r"norm_eps and norm_min must be >= 0; got -1\.0"),
    ("gate_topk", gating, change(bias=torch.zeros(11)), r"gate_topk: bias must be \[E\] = \[12\]; got \[11\]"),
    ("gate_topk", gating, change(logits=torch.randn(8, 4, 64)),
     r"gate_topk: logits must be \[T, E\]; got \[8, 4, 64\]"),
    ("gate", gate, change(weight=torch.randn(12, 31)), r"gate: weight must be \[E, D\] = \[\*, 32\]; got \[12, 31\]"),
    ("gate", gate, change(top_k=13), r"gate: top_k must be in 1\.\.min\(E, 64\) = 12; got 13"),
    ("route", lambda: {"ids": torch.zeros(2, 2).long(), "num_experts": 3}, change(num_experts=0), "num_experts must be >= 1; got 0"),
    ("grouped_gemm", grouped, change(weight=torch.randn(3, 16, 31)), r"weight must be \[E, N, D\].*; got \[3, 16, 31\]"),
    ("grouped_gemm", grouped, change(weight=lambda w: w.mT.contiguous().mT),
     r"grouped_gemm: weight must have a contiguous last dimension .*; got strides \(512, 1, 16\)"),
    ("grouped_gemm", grouped, change(offsets=lambda o: o[:3]), r"grouped_gemm: offsets must be \[E\+1\].*; got \[3\]"),
    ("grouped_gemm", grouped, change(activation="swish"), "activation must be one of none, silu.*; got 'swish'"),
    ("grouped_gemm", grouped, change(limit=-1.0), r"limit must be positive or None; got -1\.0"),
    ("grouped_gemm", grouped, change(interleaved=True), "interleaved applies to gated experts only"),
    ("combine", sums, change(y=torch.randn(7, 16)), r"combine: y must be \[T\*K, D\] = \[8, \*\]; got \[7, 16\]"),
    ("combine", sums, change(num_experts=3), "combine: ids and num_experts are given together or not at all"),
    ("fused_experts", experts, change(w_gate_up=torch.randn(4, 48, 32)),
     r"fused_experts: w_gate_up must be \[E, 2F, D\] = \[3, 48, 32\]; got \[4, 48, 32\]"),
    ("fused_experts", experts, change(w_gate_up=torch.randn(3, 48, 31)),
     r"w_gate_up must be \[E, 2F, D\] = \[3, 48, 32\]; got \[3, 48, 31\]"),
    ("fused_experts", experts, change(w_down=torch.randn(3, 32, 23)),
     r"w_gate_up must be \[E, 2F, D\] = \[3, 46, 32\]; got \[3, 48, 32\]"),
    ("fused_experts", experts, change(w_down=torch.randn(3, 31, 24)), r"w_down must be \[E, D, F\].*; got \[3, 31, 24\]"),
    ("fused_experts", experts, change(w_down=lambda w: w.mT.contiguous().mT),
     "fused_experts: w_down must have a contiguous last dimension .*; got strides"),
    ("fused_experts", experts, change(ids=lambda i: i[:3]), r"fused_experts: ids must be \[T, K\].*; got \[3, 2\]"),
    ("fused_experts", experts, change(weights=lambda w: w[:, :1]), r"weights must be \[T, K\] = \[4, 2\]; got \[4, 1\]"),
    ("mla_decode", paged, change(block_table=torch.zeros(1, 3).int()), r"mla_decode: block_table .*; got \[1, 3\]"),
    ("mla_decode", decode, change(q=torch.randn(2, 9, 4, 24)), r"q must have 1\.\.8 query tokens; got 9"),
    ("mla_decode", decode, change(w_kv_b=torch.randn(4 * 32, 31)), r"w_kv_b must be .*= \[\*, 32\]; got \[128, 31\]"),
    ("mla_decode", decode, change(w_kv_b=torch.randn(4 * 16, 32)), r"w_kv_b must have H \* \(N \+ V\) rows .*; got 64"),
    ("mla_decode", decode, change(k_rope=torch.randn(2, 19, 8)), r"k_rope must be .*= \[2, 20, \*\]; got \[2, 19, 8\]"),
    ("mla_decode", decode, change(latent=lambda v: v.mT.contiguous().mT),
     r"mla_decode: the last dimension of latent must be contiguous; got strides \(640, 1, 20\)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "good", "edit", "pattern"), BAD, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(BAD)]
)
def test_bad_arguments(name: str, good: Any, edit: Any, pattern: str) -> None:
    function = getattr(moekern.ops, name)
    function(**good())  # what is edited is right otherwise
    with pytest.raises(ValueError, match=pattern) as raised:
        function(**edit(good()))
    assert str(raised.value).startswith(f"{name}: ")


@pytest.mark.parametrize("lengths", [[49, 1], [3, 48]])
def test_lengths_beyond_the_block_table_are_cut(lengths: list[int]) -> None:
    """A length cannot be checked without a sync: what the table is too short for does not exist."""
    long, cut = (
        moekern.ops.mla_decode(**{**torch_seed(paged), "lengths": torch.tensor(v, dtype=torch.int32)})
        for v in (lengths, [min(n, 48) for n in lengths])
    )
    torch.testing.assert_close(long, cut, rtol=0, atol=0)


def torch_seed(make_arguments: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return make_arguments()
