"""How GPU backends launch, for every op: on the current stream and device, without a host sync, inside a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import available, evaluate, make, same_bits
from torch import Tensor

from moekern import _native, _op
from moekern._op import Case, OpSpec
from moekern.ops import SPECS, gate_topk
from moekern.ops.gate_topk import ref

pytestmark = pytest.mark.gpu

BACKENDS = ("triton", "cuda")


def grid() -> list[Any]:
    """Every op and GPU backend, with the first small case that has tokens."""
    return [
        pytest.param(spec, backend, next(c for c in spec.cases if c.small), id=f"{name}-{backend}")
        for name, spec in SPECS.items()
        for backend in BACKENDS
        if (available(spec, backend) if torch.cuda.is_available() else backend in spec.backends)
    ]


def on_gpu(spec: OpSpec, case: Case, seed: int = 0, device: str = "cuda") -> dict[str, Any]:
    return make(spec, case, torch.bfloat16, seed, device)


def run(spec: OpSpec, backend: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    return evaluate(spec, lambda **bound: _op.call(spec, backend, **bound), arguments)


def test_cuda_was_built_and_finds_the_stream() -> None:
    """The weak symbol resolves: the library finds libtorch_cuda through libtorch, and the leaves are there."""
    leaves, reason = _native.load()
    assert reason is None
    assert _native.build_note()["cuda"].startswith("nvcc")
    assert "_gate_topk_cuda" in leaves
    assert _native.reason_without("_gate_topk_cuda") is None


@pytest.mark.parametrize(("spec", "backend", "case"), grid())
def test_no_host_sync(spec: OpSpec, backend: str, case: Case) -> None:
    arguments = on_gpu(spec, case)
    run(spec, backend, arguments)  # compiles and loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(spec, backend, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("spec", "backend", "case"), grid())
def test_current_stream(spec: OpSpec, backend: str, case: Case) -> None:
    """The inputs arrive late on a side stream; a launch on any other stream would read what was there before."""
    late, early = on_gpu(spec, case, seed=1), on_gpu(spec, case, seed=2)
    expected = [v.clone() for v in run(spec, backend, late)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        for name, value in early.items():
            if isinstance(value, Tensor):
                value.copy_(late[name])
        found = run(spec, backend, early)
    stream.synchronize()
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert same_bits(a, b), f"output {i}"


@pytest.mark.parametrize(("spec", "backend", "case"), grid())
def test_graph_replays_on_new_inputs(spec: OpSpec, backend: str, case: Case) -> None:
    static, fresh = on_gpu(spec, case, seed=1), on_gpu(spec, case, seed=2)
    expected = [v.clone() for v in run(spec, backend, fresh)]
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        run(spec, backend, static)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(spec, backend, static)
    for name, value in static.items():
        if isinstance(value, Tensor):
            value.copy_(fresh[name])
    for _ in range(2):  # a second replay shows state left behind by the first
        graph.replay()
        torch.cuda.synchronize()
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert same_bits(a, b), f"output {i}"


if torch.cuda.device_count() > 1:  # not a skip: on a machine with a GPU a skip is a failure

    @pytest.mark.parametrize(("spec", "backend", "case"), grid())
    def test_device_of_the_tensor(spec: OpSpec, backend: str, case: Case) -> None:
        expected = run(spec, backend, on_gpu(spec, case))
        assert torch.cuda.current_device() == 0
        found = run(spec, backend, on_gpu(spec, case, device="cuda:1"))
        assert torch.cuda.current_device() == 0
        for a, b in zip(found, expected, strict=True):
            assert a.device.index == 1
            assert same_bits(a.cpu(), b.cpu())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gate_topk_offsets_are_64_bit(backend: str) -> None:
    """The last row starts 2^31 elements and more behind the first."""
    logits = torch.randn(5, 64, device="cuda", dtype=torch.bfloat16)
    storage = torch.zeros(4 * 2**29 + 2**29 + 64, device="cuda", dtype=torch.bfloat16)  # 5.4 GB
    far = storage.as_strided((5, 64), (2**29 + 8, 1))
    far.copy_(logits)
    weights, ids = gate_topk(far, 6, backend=backend)
    expected_weights, expected_ids = gate_topk(logits, 6, backend=backend)
    assert same_bits(weights, expected_weights)
    assert same_bits(ids, expected_ids)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [1, 1023, 1024, 65537])
def test_gate_topk_on_many_tokens(backend: str, num_tokens: int) -> None:
    """Every launch shape: one and four warps a block, one and several rows a program."""
    generator = torch.Generator().manual_seed(num_tokens)
    for num_experts, gating in (
        (8, {}),
        (64, {}),
        (256, {"num_groups": 8, "topk_groups": 4, "group_score": "top2"}),
    ):
        logits = torch.randn(num_tokens, num_experts, generator=generator)
        weights, ids = gate_topk(logits.cuda(), 6, scoring="softmax_topk", backend=backend, **gating)
        expected_weights, expected_ids = ref.gate_topk(logits, 6, scoring="softmax_topk", **gating)
        assert torch.equal(ids.cpu(), expected_ids)
        torch.testing.assert_close(weights.cpu(), expected_weights, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gate_topk_compiles(backend: str) -> None:
    logits = torch.randn(9, 64, device="cuda", dtype=torch.bfloat16)
    eager = gate_topk(logits, 6, renormalize=True, backend=backend)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: gate_topk(x, 6, renormalize=True, backend=backend), fullgraph=True,
                             backend="aot_eager")(logits)  # fmt: skip
    for a, b in zip(compiled, eager, strict=True):
        assert same_bits(a, b)
