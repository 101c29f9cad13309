"""fused_experts' two Triton paths where the generic cases take only one: every layout through both, ids that are none, the
same numbers as the ops it is made of, and what `choose` picks."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from support import available, device_of, make, same_bits
from torch import Tensor
from yardstick import in_fp64

from moekern._op import Case
from moekern._triton import PARTS
from moekern.ops import SPECS, combine, fused_experts, grouped_gemm, route
from moekern.ops.fused_experts import config, ref
from moekern.ops.fused_experts.cases import GPT_OSS, make_case
from moekern.ops.fused_experts.config import FewConfig, RoutedConfig

if not available(SPECS["fused_experts"], "triton"):
    pytest.skip("neither Triton's interpreter nor a GPU", allow_module_level=True)

from moekern.ops.fused_experts import triton as kernels

SPEC = SPECS["fused_experts"]
DEVICE = device_of("triton")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
FEW = FewConfig(
    block_t=8, up_n=32, up_k=16, up_warps=2, up_stages=4, down_n=16, down_k=16, down_warps=2, down_stages=4
)
PATHS = {"few": FEW, "routed": RoutedConfig()}
LAYOUTS: dict[str, dict[str, Any]] = {
    "concatenated": {},
    "concatenated_bias_limit": {"bias": True, "limit": 0.7, "alpha": 1.702, "up_shift": 1.0},
    "interleaved": {"interleaved": True},
    "transposed": {"transposed": True, "activation": "gelu"},
    "gpt_oss": {"bias": True, **GPT_OSS},
    "plain": {"gated": False, "activation": "relu2", "limit": 1.0},
    "plain_transposed_bias": {"gated": False, "activation": "gelu_tanh", "transposed": True, "bias": True},
    "strided": {"strided": True, "interleaved": True},
}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces one path with tiles that do not divide the shapes below."""
    monkeypatch.setattr(kernels, "choose", lambda *_: PATHS[request.param])
    return str(request.param)


def close(got: Tensor, arguments: dict[str, Any]) -> None:
    expected = ref.fused_experts(**in_fp64(arguments))
    scale = expected.square().mean().sqrt().clamp_min(1e-30)
    assert ((got.double() - expected) / scale).abs().max() < 2e-5


@functools.cache
def arguments_of(layout: str, reduce: bool, num_tokens: int = 2, **kwargs: Any) -> dict[str, Any]:
    case = Case(layout, make_case(num_tokens, 5, 3, 36, 54, reduce=reduce, **LAYOUTS[layout], **kwargs))
    return make(SPEC, case, torch.float32, device=DEVICE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_on_both_paths(path: str, layout: str) -> None:
    arguments = arguments_of(layout, True)
    close(fused_experts(**arguments, backend="triton"), arguments)


@pytest.mark.parametrize(("layout", "reduce"), [("concatenated_bias_limit", True), ("transposed", False)])
def test_ids_that_are_none(path: str, layout: str, reduce: bool) -> None:
    """A skipped pair contributes nothing, whatever its weight; its row is 0. Experts repeat, within a token too."""
    arguments = dict(arguments_of(layout, reduce, 4))
    largest = 2**63 - 1
    ids = torch.tensor([[-1, 4, 2], [4, 5, 4], [largest, -(2**63), 2**32], [2**31, 0, 0]], device=DEVICE)
    outside = (ids < 0) | (ids >= 5)
    arguments |= {"ids": ids, "weights": arguments["weights"].masked_fill(outside, torch.nan)}
    got = fused_experts(**arguments, backend="triton")
    close(got, arguments)
    rows = got.unflatten(0, ids.shape) if not reduce else got[2]
    assert not (rows[outside] if not reduce else rows).any()


def test_an_infinite_weight_stays_with_its_pairs(path: str) -> None:
    arguments = dict(arguments_of("concatenated", False, 3))
    ids = torch.tensor([[0, 1, 2], [1, 2, 3], [0, 2, 4]], device=DEVICE)
    w_down = arguments["w_down"].clone()
    w_down[1, 7, 3] = torch.inf
    w_gate_up = arguments["w_gate_up"].clone()
    w_gate_up[4, 5] = torch.nan
    arguments |= {"ids": ids, "w_down": w_down, "w_gate_up": w_gate_up}
    got = fused_experts(**arguments, backend="triton")
    healthy = ~((ids == 1) | (ids == 4)).reshape(-1)
    assert got[healthy].isfinite().all()
    assert not got[~healthy].isfinite().all(dim=1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_numbers_as_its_parts(path: str, dtype: torch.dtype) -> None:
    case = Case("parts", make_case(6, 4, 2, 40, 24, bias=True, outside=True))
    a = make(SPEC, case, dtype, device=DEVICE)
    perm, offsets, _ = route(a["ids"], 4)
    tokens = torch.where(perm >= 0, perm // 2, -1).int()
    h = grouped_gemm(
        a["x"], a["w_gate_up"], offsets, gather=tokens, bias=a["b_gate_up"], activation="silu", gated=True
    )
    y = grouped_gemm(h, a["w_down"], offsets, bias=a["b_down"])
    rows = torch.full((12, 40), torch.nan, dtype=dtype, device=DEVICE)
    rows[perm[perm >= 0].long()] = y[perm >= 0]
    expected = combine(rows, a["weights"], ids=a["ids"], num_experts=4)
    got = fused_experts(**a, backend="triton")
    # Sums in another order may round h and the rows to a neighbour.
    torch.testing.assert_close(
        got, expected, rtol=0, atol=(2e-6 if dtype == torch.float32 else 0.02) * expected.abs().max()
    )


def test_pair_rows_combined_later_have_the_same_bits(path: str) -> None:
    """Experts computed in two calls, each into its own rows, and summed by combine: as offloading does."""
    arguments = arguments_of("concatenated_bias_limit", True, 3)
    whole = fused_experts(**arguments, backend="triton")
    ids, weights = arguments["ids"], arguments["weights"]
    rows = torch.zeros(ids.numel(), whole.shape[1], device=DEVICE)
    for kept in (ids % 2 == 0, ids % 2 == 1):
        some = {**arguments, "ids": torch.where(kept, ids, -1), "reduce": False}
        rows += fused_experts(**some, backend="triton")
    assert same_bits(combine(rows, weights, backend="triton"), whole)


def test_a_tokens_result_does_not_depend_on_the_others(path: str) -> None:
    """A column of the matrix instruction is one token's: neighbours share weights, not sums."""
    arguments = arguments_of("concatenated", True, 3)
    whole = fused_experts(**arguments, backend="triton")
    for t in (0, 2):
        one = {**arguments, **{n: arguments[n][t : t + 1] for n in ("x", "ids", "weights")}}
        got = fused_experts(**one, backend="triton")[0]
        assert same_bits(got, whole[t]) if path == "few" else (got - whole[t]).abs().max() < 1e-5


def test_more_pairs_than_a_matrix_instruction_has_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "choose", lambda *_: FEW)
    arguments = make(SPEC, Case("k11", make_case(2, 14, 11, 20, 34)), torch.float32, device=DEVICE)
    close(fused_experts(**arguments, backend="triton"), arguments)


@pytest.mark.parametrize("gpu", PARTS.values(), ids=lambda gpu: f"sm_{gpu.capability}")
def test_choice(gpu: Any) -> None:
    """One token never takes the route; many tokens do; a shape's configurations fit the part."""
    shapes = {"v2_lite": (64, 6, 2048, 1408), "qwen3": (128, 8, 2048, 768), "narrow": (512, 10, 2048, 128),
              "mixtral": (8, 2, 4096, 14336), "gpt_oss": (32, 4, 2880, 2880)}  # fmt: skip
    last = {}
    for name, (e, k, d, f) in shapes.items():
        for tokens in range(1, 33):
            for transposed in (False, True):
                picked = config.choose(tokens, e, k, d, f, True, transposed, 2, gpu)
                if isinstance(picked, RoutedConfig):
                    assert tokens > 1
                    continue
                last[name] = tokens
                assert picked.block_t >= tokens
                buffers = max(
                    (picked.up_stages - 1) * (picked.up_n + picked.block_t) * picked.up_k,
                    (picked.down_stages - 1) * 2 * (picked.down_n + 16) * picked.down_k,
                )
                assert 2 * buffers < gpu.shared
                assert all(
                    1 << (value.bit_length() - 1) == value
                    for field, value in dataclasses.asdict(picked).items()
                    if not field.endswith("stages")
                )
    assert last["mixtral"] == 1, "a second token would read 117 MB of W_down again"
    assert last["narrow"] > last["qwen3"] >= last["v2_lite"] > 1


def test_every_candidate_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of("concatenated_bias_limit", True, 2)
    found = list(config.candidates(2, 5, 3, 36, 54, True, False, 4, PARTS[90]))
    assert 5 <= len(found) <= 30
    for picked in found[::6]:
        monkeypatch.setattr(kernels, "choose", lambda *_, picked=picked: picked)
        close(fused_experts(**arguments, backend="triton"), arguments)
