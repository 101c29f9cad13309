"""What is measured on a GPU: one declarative table. `python -m bench gpu` measures it, `python -m bench report` shows it.

T tokens, D model width, F expert width, E experts, K selected experts, B batch, S cached positions, H heads. A goal is a
pair (quantity, value), the quantities being those of QUANTITIES.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Goal = tuple[str, float]


@dataclass(frozen=True)
class Quantity:
    """unit: how a value is written. smaller: whether less is better."""

    unit: str
    smaller: bool = False


QUANTITIES = {
    "tflops": Quantity("{:.0f} TFLOP/s"),
    "read_tbps": Quantity("{:.2f} TB/s"),
    "read_share": Quantity("{:.0%} of read bandwidth"),
    "copy_share": Quantity("{:.0%} of copy bandwidth"),
    "us": Quantity("{:.1f} us", smaller=True),
    "ratio": Quantity("{:.2f}x the uniform time", smaller=True),
    "host_us": Quantity("{:.1f} us", smaller=True),
    "speedup": Quantity("{:.2f}x"),
}


@dataclass(frozen=True)
class GpuCase:
    """One case of an op.

    shape: arguments of the op's entry in gpu_inputs.INPUTS. ceiling: what the row is a share of, the rate of a large GEMM
    ("gemm"), a read ("read") or a copy ("copy"). reference: the case whose time "ratio" divides by. method: "graph" (many
    launches in a CUDA graph), "host" (host time of eager calls) or "model" (`python -m bench e2e`). compiled_peers: peers
    are timed under torch.compile too, which takes seconds a case.
    """

    op: str
    name: str
    shape: Mapping[str, Any] = field(hash=False)
    ceiling: str = "copy"
    at_least: Goal | None = None
    aim: Goal | None = None
    reference: str | None = None
    method: str = "graph"
    compiled_peers: bool = False


def _experts(name: str, T: int, goals: tuple[Goal, Goal] | None = None, *, ceiling: str | None = None,
             routing: str = "uniform", **options: Any) -> GpuCase:  # fmt: skip
    """name is the layer's; the rest of the case's name follows."""
    suffix = {"uniform": "", "zipf": ", Zipf 1", "half": ", half of the rows to one expert"}[routing]
    at_least, aim = goals or (None, None)
    return GpuCase(
        "fused_experts", f"{name}, T {T}{suffix}", {"T": T, **LAYERS[name], "routing": routing},
        # Every expert's matrices are read once: below 300 rows an expert, that takes longer than the products.
        ceiling or ("gemm" if T >= 2048 else "read"), at_least, aim, **options,
    )  # fmt: skip


LAYERS: dict[str, dict[str, int]] = {
    "D 4096 F 2048 E 64 K 4": {"D": 4096, "F": 2048, "E": 64, "K": 4},
    "D 4096 F 256 E 256 K 16": {"D": 4096, "F": 256, "E": 256, "K": 16},
    "V2-Lite": {"D": 2048, "F": 1408, "E": 64, "K": 6},
    "Qwen3-30B-A3B": {"D": 2048, "F": 768, "E": 128, "K": 8},
    "Mixtral TP2": {"D": 4096, "F": 7168, "E": 8, "K": 2},
    "D 2048 F 128 E 512 K 10": {"D": 2048, "F": 128, "E": 512, "K": 10},
}
MLA = {"H": 16, "R": 512, "P": 64, "N": 128, "V": 128}  # DeepSeek-V2-Lite's attention


def _pair(quantity: str, at_least: float, aim: float) -> tuple[Goal, Goal]:
    return (quantity, at_least), (quantity, aim)


def _expert_cases() -> list[GpuCase]:
    share, skewed = _pair("read_share", 0.75, 0.90), _pair("ratio", 1.25, 1.1)
    v2, qwen = "V2-Lite", "Qwen3-30B-A3B"
    cases = [
        _experts("D 4096 F 2048 E 64 K 4", 32768, _pair("tflops", 450, 594)),
        _experts("D 4096 F 256 E 256 K 16", 32768, _pair("tflops", 280, 428)),
        _experts(v2, 1, compiled_peers=True),
    ]
    cases += [_experts(v2, t, share, compiled_peers=t == 16) for t in (16, 64, 256)]
    cases += [_experts(v2, 2048, _pair("tflops", 200, 280))]
    cases += [_experts(v2, t, _pair("tflops", 330, 430), compiled_peers=t == 4096) for t in (4096, 8192)]
    cases += [
        _experts(v2, 4096, skewed, routing=r, reference=f"{v2}, T 4096", ceiling="gemm")
        for r in ("zipf", "half")
    ]
    cases += [_experts(qwen, 1)]
    cases += [_experts(qwen, t, share) for t in (16, 64, 256)]
    cases += [_experts(qwen, 2048, _pair("tflops", 200, 280))]
    cases += [_experts(qwen, t, _pair("tflops", 300, 400)) for t in (4096, 8192)]
    published = (1, 2.45), (32, 2.89)
    cases += [
        _experts("Mixtral TP2", t, (("read_tbps", least), ("read_share", 0.95))) for t, least in published
    ]
    cases += [_experts("D 2048 F 128 E 512 K 10", 1, _pair("us", 29, 15), compiled_peers=True)]
    return cases


def _mla_cases() -> list[GpuCase]:
    def decode(
        batch: int, length: int, goals: tuple[Goal, Goal] | tuple[None, None] = (None, None)
    ) -> GpuCase:
        name = f"16 heads, batch {batch}, {length} cached"
        shape = {"B": batch, "S": length, **MLA}
        return GpuCase(
            "mla_decode", name, shape, "read", goals[0], goals[1], compiled_peers=(batch, length) == (1, 4096)
        )

    def decompress(length: int) -> GpuCase:
        goals = _pair("copy_share", 0.80, 0.90)
        return GpuCase(
            "mla_decompress", f"16 heads, {length} tokens", {"B": 1, "S": length, **MLA}, "copy", *goals
        )

    return [
        decode(128, 4096, _pair("us", 300, 215)),
        *(decode(batch, 1024, _pair("us", 18, 12)) for batch in (1, 4, 16)),
        decode(1, 4096),
        decode(1, 16384),
        decode(16, 16384),
        decompress(4096),
        decompress(16384),
        *(
            GpuCase("mla_cache_write", f"T {t}", {"T": t, **MLA}, compiled_peers=t != 16)
            for t in (1, 16, 4096)
        ),
    ]


def _routing_cases() -> list[GpuCase]:
    goals = _pair("us", 2.4, 1.8)
    gate_topk = [GpuCase("gate_topk", f"E {e} K 8, T {t}", {"T": t, "E": e, "K": 8})
                 for t in (1, 64, 4096) for e in (64, 128, 256, 512)]  # fmt: skip
    gate_topk = [
        replace(c, at_least=goals[0], aim=goals[1], compiled_peers=True) if c.name == "E 256 K 8, T 1" else c
        for c in gate_topk
    ]
    gate = [
        GpuCase("gate", f"D {d} E {e} K {k}, T {t}", {"T": t, "D": d, "E": e, "K": k}, "read" if t < 4096 else "copy",
                compiled_peers=(t, e) == (1, 64))
        for d, e, k in ((2048, 64, 6), (2048, 128, 8), (7168, 256, 8)) for t in (1, 64, 4096)
    ]  # fmt: skip
    # A layer's ids: one launch for a few tokens, several for many.
    route = [
        GpuCase("route", f"E {e} K {k}, T {t}", {"T": t, "E": e, "K": k})
        for e, k in ((64, 6), (128, 8)) for t in (1, 64, 4096, 32768)
    ]  # fmt: skip
    combine = [
        GpuCase("combine", f"D 2048 K 6, T {t}", {"T": t, "D": 2048, "K": 6}, compiled_peers=t == 4096)
        for t in (1, 64, 4096)
    ]
    grouped = [
        GpuCase("grouped_gemm", f"V2-Lite gate and up, T {t}", {"T": t, **LAYERS["V2-Lite"]},
                "gemm" if t >= 2048 else "read")
        for t in (16, 4096)
    ]  # fmt: skip
    return [*gate_topk, *gate, *route, *combine, *grouped]


def _host_cases() -> list[GpuCase]:
    """Eager host time of a call, on shapes whose kernels are shorter than it."""
    goals = _pair("host_us", 15, 8)
    shapes: dict[str, dict[str, Any]] = {
        "gate_topk": {"T": 1, "E": 64, "K": 6},
        "gate": {"T": 1, "D": 256, "E": 64, "K": 6},
        "route": {"T": 1, "E": 64, "K": 6},
        "grouped_gemm": {"T": 1, "D": 256, "F": 128, "E": 16, "K": 4},
        "combine": {"T": 1, "D": 256, "K": 6},
        "fused_experts": {"T": 1, "D": 256, "F": 128, "E": 16, "K": 4, "routing": "uniform"},
        "mla_decode": {"B": 1, "S": 128, **MLA},
        "mla_decompress": {"B": 1, "S": 16, **MLA},
        "mla_cache_write": {"T": 1, **MLA},
    }
    return [
        GpuCase(op, "eager host time", shape, at_least=goals[0], aim=goals[1], method="host")
        for op, shape in shapes.items()
    ]


def _model_cases() -> list[GpuCase]:
    """DeepSeek-V2-Lite, 27 layers, one decode step; timed by `python -m bench e2e`, not within `gpu-check`."""
    cases = []
    for mode in ("eager", "compiled"):
        for batch in (1, 16):
            for length in (512, 4096, 16384):
                goal = (mode, batch, length) == ("compiled", 1, 4096)
                cases.append(GpuCase(
                    "model", f"V2-Lite decode, batch {batch}, {length} cached, {mode}",
                    {"batch": batch, "length": length, "mode": mode}, "read", ("speedup", 2.0) if goal else None,
                    ("speedup", 4.0) if goal else None, method="model",
                ))  # fmt: skip
    return cases


CASES: tuple[GpuCase, ...] = (
    *_expert_cases(),
    *_mla_cases(),
    *_routing_cases(),
    *_host_cases(),
    *_model_cases(),
)


def value_of(goal: Goal) -> str:
    """A goal as text."""
    return QUANTITIES[goal[0]].unit.format(goal[1])


def reaches(goal: Goal, value: float) -> bool:
    return value <= goal[1] if QUANTITIES[goal[0]].smaller else value >= goal[1]
