"""route: expert ids -> the pairs of each expert.

T tokens, E experts, K selected experts per token; a pair is one (token, selected expert), t*K+k its flat index.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekern import _native, _op, _triton
from moekern._check import expect_dtype, expect_shape
from moekern._op import Backend, Case, OpSpec
from moekern.ops.route import config, ref

MAX_PAIRS = 2**31 - 1  # perm is int32

SCHEMA = "(Tensor ids, int num_experts) -> (Tensor, Tensor, Tensor)"


def route(ids: Tensor, num_experts: int, *, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the (token, expert) pairs by expert.

    Args:
        ids: [T, K] int32 or int64. A pair whose id is outside [0, E) belongs to no expert.
        num_experts: E.
        backend: forces one backend.

    Returns:
        perm [T*K] int32: perm[offsets[e]:offsets[e+1]] are the flat indices t*K+k of the pairs of expert e, ascending;
        -1 from offsets[E] on. offsets [E+1] int32. counts [E] int32.

    Raises:
        ValueError, TypeError: for arguments that do not fit together.

    Notes:
        Deterministic; no host sync. Traffic: the ids in, perm, offsets and counts out.
    """
    return _op.call(SPEC, backend, ids=ids, num_experts=num_experts)


def check_ids(op: str, ids: Tensor, num_tokens: int | None = None, like: Tensor | None = None) -> None:
    """The check of expert ids [T, K] that the expert ops share."""
    expect_shape(op, "ids", ids, "[T, K]", (num_tokens, None), like=like)
    expect_dtype(op, "ids", ids, "int32 or int64", ids.dtype in (torch.int32, torch.int64))
    if ids.numel() > MAX_PAIRS:
        raise ValueError(f"{op}: T*K must be at most {MAX_PAIRS}; got {ids.numel()}")


def _check(ids: Tensor, num_experts: int) -> None:
    check_ids("route", ids)
    if num_experts < 1:
        raise ValueError(f"route: num_experts must be >= 1; got {num_experts}")


def _fake(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (ids.numel(), num_experts + 1, num_experts)
    perm, offsets, counts = (ids.new_empty(n, dtype=torch.int32) for n in sizes)
    return perm, offsets, counts


_cpu_leaf = _native.leaf(
    "_route_cpu(Tensor ids, Tensor(a!) perm, Tensor(b!) offsets, Tensor(c!) counts) -> ()"
)


def _run_cpu(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _fake(ids, num_experts)
    _cpu_leaf(ids.contiguous(), *outputs)
    return outputs


def _supports_cpu(ids: Tensor, **_: Any) -> str | None:
    return None if ids.device.type == "cpu" else f"ids are on {ids.device}"


def _run_triton(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    from moekern.ops.route import triton  # importing Triton takes 0.1 s, so it waits for the first call

    return triton.run(ids, num_experts)


def _supports_triton(ids: Tensor, num_experts: int) -> str | None:
    if num_experts > config.MAX_EXPERTS:
        return f"E = {num_experts} exceeds {config.MAX_EXPERTS}"
    return _triton.refuses(ids)


def _case(num_tokens: int, num_experts: int, top_k: int, *, low: int = 0, high: int | None = None,
          dtype: torch.dtype = torch.int64, only: int | None = None) -> Any:  # fmt: skip
    def make(generator: torch.Generator, _: torch.dtype, device: torch.device) -> dict[str, Any]:
        ids = torch.randint(low, high or num_experts, (num_tokens, top_k), generator=generator, dtype=dtype)
        if only is not None:
            ids.fill_(only)
        if low < 0 and ids.numel() > 2:
            ids.view(-1)[0] = torch.iinfo(dtype).max
            ids.view(-1)[1] = torch.iinfo(dtype).min
        return {"ids": ids.to(device), "num_experts": num_experts}

    return make


CASES = (
    Case("v2_lite_decode", _case(1, 64, 6), bench="DeepSeek-V2-Lite decode"),
    Case("v2_lite_64", _case(64, 64, 6)),
    Case("qwen3_int32", _case(37, 128, 8, dtype=torch.int32)),
    Case("outside", _case(33, 12, 4, low=-3, high=16)),
    Case("outside_int32", _case(33, 12, 4, low=-3, high=16, dtype=torch.int32)),
    Case("all_outside", _case(9, 5, 2, only=5)),
    Case("one_expert_gets_all", _case(50, 7, 3, only=4)),
    Case("many_experts", _case(11, 1000, 10)),
    Case("k1", _case(29, 3, 1)),
    Case("single_expert", _case(5, 1, 1)),
    Case("no_tokens", _case(0, 64, 6)),
    Case("prefill_4096", _case(4096, 64, 6), small=False, bench="DeepSeek-V2-Lite prefill"),
)

SPEC = OpSpec(
    name="route",
    schema=SCHEMA,
    check=_check,
    ref=ref.route,
    fake=_fake,
    backends={
        "ref": Backend(ref.route),
        "cpu": Backend(_run_cpu, lambda: _native.reason_without("_route_cpu"), _supports_cpu),
        "triton": Backend(_run_triton, _triton.unavailable, _supports_triton),
    },
    cases=CASES,
    outputs=("exact", "exact", "exact"),
    flops=lambda ids, **_: ids.numel(),
    bytes=lambda ids, num_experts: ids.numel() * (ids.element_size() + 4) + 8 * num_experts,
)
