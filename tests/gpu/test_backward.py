"""The gradients of the expert ops on a GPU: no host sync, inside a CUDA graph, and sizes that the interpreter is too slow
for: full tiles, several steps of a pipeline, an expert that is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.test_experts_backward import NAMES, check, output_gradient
from support import make, same_bits
from test_ops import light_cases
from torch import Tensor

from moekern._op import OpSpec
from moekern.ops import SPECS
from moekern.ops.fused_experts.cases import GPT_OSS, make_case

pytestmark = pytest.mark.gpu


def backward_of(spec: OpSpec, arguments: dict[str, Any]) -> Callable[[], list[Tensor]]:
    assert spec.backward is not None
    grad = output_gradient(spec.ref(**arguments))
    needs = [arguments[n] is not None for n in spec.backward.inputs]
    op = getattr(torch.ops.moekern, f"_{spec.name}_backward")
    return lambda: op(grad, *(arguments[n] for n in spec.arguments), needs, "triton")


@pytest.mark.parametrize("name", NAMES)
def test_no_host_sync(name: str) -> None:
    spec = SPECS[name]
    function = backward_of(spec, make(spec, light_cases(spec, 1)[0], torch.bfloat16, device="cuda"))
    function()  # compiles and loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_graph_replays(name: str) -> None:
    spec = SPECS[name]
    function = backward_of(spec, make(spec, light_cases(spec, 1)[0], torch.bfloat16, device="cuda"))
    expected = [v.clone() for v in function()]
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        function()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function()
    for _ in range(2):  # a second replay shows state left behind by the first
        graph.replay()
        torch.cuda.synchronize()
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert same_bits(a, b), f"gradient {i}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1500, 6, 2, 512, 384), {}),
        ((1500, 6, 2, 520, 392), {"bias": True, **GPT_OSS}),
        ((1301, 5, 3, 333, 250), {"gated": False, "activation": "gelu"}),
        ((2100, 4, 1, 256, 320), {"only": 2}),
    ],
    ids=["silu", "gpt_oss", "ragged", "one_expert"],
)
def test_full_tiles(
    sizes: tuple[int, int, int, int, int], options: dict[str, Any], dtype: torch.dtype
) -> None:
    spec = SPECS["fused_experts"]
    arguments = make_case(*sizes, **options)(torch.Generator().manual_seed(0), dtype, torch.device("cpu"))
    check(spec, spec.bind((), arguments), dtype)
