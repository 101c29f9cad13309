"""Gradients of the expert ops by their Triton kernels, in the interpreter where there is no GPU: every case against
autograd through the definition in fp64, and what only sizes or data reach."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import yardstick
from ops.test_grouped_gemm_backward import shrink_tiles
from support import DTYPE_IDS, device_of, make, same_bits
from test_memory import HERE, python
from test_ops import differentiable, has_rows, light_cases, loss_of, reference_gradients
from torch import Tensor

from moekern import _op, _triton
from moekern._op import Case, OpSpec
from moekern.ops import SPECS
from moekern.ops.fused_experts.cases import GPT_OSS, make_case

pytestmark = [pytest.mark.skipif(_triton.unavailable() is not None, reason="no Triton")]
if device_of("triton").type == "cuda":
    pytestmark.append(pytest.mark.gpu)
NAMES = ("grouped_gemm", "fused_experts")


def output_gradient(output: Tensor) -> Tensor:
    """What loss_of sends back into an output."""
    leaf = output.detach().cpu().requires_grad_()
    (found,) = torch.autograd.grad(loss_of((leaf,)), [leaf])
    return found.to(output.device)


def triton_gradients(
    spec: OpSpec, arguments: dict[str, Any], grad: Tensor, only: str | None = None
) -> dict[str, Tensor]:
    """The backward op on its own: it does not hang on which backend ran the forward."""
    assert spec.backward is not None
    names = [n for n in spec.backward.inputs if arguments[n] is not None and only in (n, None)]
    needs = [n in names for n in spec.backward.inputs]
    device = device_of("triton")
    moved = [v.to(device) if isinstance(v, Tensor) else v for v in (arguments[n] for n in spec.arguments)]
    op = getattr(torch.ops.moekern, f"_{spec.name}_backward")
    return dict(zip(names, (g.cpu() for g in op(grad.to(device), *moved, needs, "triton")), strict=True))


def check(spec: OpSpec, arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    grad = output_gradient(spec.ref(**arguments))
    found = triton_gradients(spec, arguments, grad)
    truth = reference_gradients(spec, spec.ref, yardstick.in_fp64(arguments))
    plain = reference_gradients(spec, spec.ref, arguments)
    assert found.keys() == differentiable(spec, arguments).keys()
    for name, gradient in found.items():
        assert (gradient.dtype, gradient.shape) == (arguments[name].dtype, arguments[name].shape)
        assert gradient.is_contiguous()
        yardstick.check_error([gradient], [truth[name]], [plain[name]], "model", dtype,
                              yardstick.sum_length(arguments), f"gradient of {name}", slack=1.5)  # fmt: skip
    return found


def cases() -> list[Any]:
    found = []
    for name in NAMES:
        spec = SPECS[name]
        for case in spec.cases:
            for dtype in spec.dtypes:
                if case.small and (dtype == torch.float32 or case in light_cases(spec, 3)):
                    found.append(pytest.param(spec, dtype, case, id=f"{name}-{case.id}-{DTYPE_IDS[dtype]}"))
    return found


@pytest.mark.parametrize(("spec", "dtype", "case"), cases())
def test_gradients(spec: OpSpec, dtype: torch.dtype, case: Case) -> None:
    arguments = make(spec, case, dtype)
    output = spec.ref(**arguments)
    if has_rows(spec, case) and output.numel() > 0:
        check(spec, arguments, dtype)
    else:
        found = triton_gradients(spec, arguments, torch.ones_like(output))
        for name, value in differentiable(spec, arguments).items():
            assert torch.equal(found[name], torch.zeros_like(value)), name


@pytest.fixture
def no_loop_over_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("the gradient of ref ran")

    for name in NAMES:
        monkeypatch.setattr(importlib.import_module(f"moekern.ops.{name}.ref"), f"{name}_backward", fail)


@pytest.mark.usefixtures("no_loop_over_experts")
@pytest.mark.parametrize("how", ["argument", "environment", "compiled"])
@pytest.mark.parametrize("spec", [SPECS[name] for name in NAMES], ids=NAMES)
def test_the_backend_of_the_forward_is_that_of_the_backward(
    spec: OpSpec, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "triton" not in spec.backends:
        pytest.skip("no forward in Triton")
    arguments = make(spec, light_cases(spec, 1)[0], torch.float32, device=device_of("triton"))
    leaves = {n: v.detach().requires_grad_() for n, v in differentiable(spec, arguments).items()}
    if how == "environment":
        monkeypatch.setenv("MOEKERN_BACKEND", "triton")

    def function(**bound: Any) -> Tensor:
        return _op.call(spec, None if how == "environment" else "triton", **bound)

    if how == "compiled":
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    output = function(**{**arguments, **leaves})
    grad = output_gradient(output)
    found = dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), grad), strict=True))
    for name, expected in triton_gradients(spec, arguments, grad).items():
        assert same_bits(found[name].cpu(), expected), name


@pytest.mark.parametrize("spec", [SPECS[name] for name in NAMES], ids=NAMES)
def test_only_asked_gradients(spec: OpSpec) -> None:
    """One at a time they have the bits of all together."""
    case = next(c for c in spec.cases if c.id in ("ragged_all_options", "gpt_oss_ragged"))
    arguments = make(spec, case, torch.float32)
    grad = output_gradient(spec.ref(**arguments))
    everything = triton_gradients(spec, arguments, grad)
    assert spec.backward is not None
    for name, value in everything.items():
        alone = triton_gradients(spec, arguments, grad, only=name)
        assert list(alone) == [name]
        assert same_bits(alone[name], value), name


@pytest.mark.parametrize("spec", [SPECS[name] for name in NAMES], ids=NAMES)
def test_same_bits_on_every_run(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch, 3)
    case = next(c for c in spec.cases if c.id in ("ragged_all_options", "ids_repeated"))
    arguments = make(spec, case, torch.bfloat16)
    before = {n: v.clone() for n, v in arguments.items() if isinstance(v, Tensor)}
    grad = output_gradient(spec.ref(**arguments))
    first = triton_gradients(spec, arguments, grad)
    for name, value in triton_gradients(spec, arguments, grad).items():
        assert same_bits(value, first[name]), name
    for name, value in before.items():
        assert same_bits(value, arguments[name]), f"{name} was changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pairs_of_no_expert(dtype: torch.dtype) -> None:
    """Hostile ids beside biases and a token without any expert: gradients of 0, and nothing read for them."""
    spec = SPECS["fused_experts"]
    arguments = make_case(9, 4, 3, 40, 24, outside=True, bias=True, **GPT_OSS)(
        torch.Generator().manual_seed(8), dtype, torch.device("cpu")
    )
    ids = arguments["ids"]
    ids[4] = torch.tensor([2**62, -(2**63), 4])
    ids[ids == 3] = 0  # an expert without rows
    found = check(spec, spec.bind((), arguments), dtype)
    outside = (ids < 0) | (ids >= 4)
    assert not found["weights"][outside].any()
    assert found["weights"][~outside].all()
    assert not found["x"][4].any()
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        assert not found[name][3].any(), name


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("case_id", ["all_to_one_expert", "transposed_bias_gpt_oss", "gather_tail"])
def test_grouped_gemm_over_many_blocks(case_id: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch, splits)
    spec = SPECS["grouped_gemm"]
    check(spec, make(spec, next(c for c in spec.cases if c.id == case_id), torch.float32), torch.float32)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "case_id", ["all_tokens_to_one_expert", "gpt_oss_ragged", "ids_outside", "concatenated_transposed_bias"]
)
def test_fused_experts_over_many_blocks(case_id: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch, splits)
    spec = SPECS["fused_experts"]
    check(spec, make(spec, next(c for c in spec.cases if c.id == case_id), torch.float32), torch.float32)


if not torch.cuda.is_available():  # not a skip: on a machine with a GPU a skip is a failure

    @pytest.mark.slow
    def test_nothing_outside_the_buffers_is_touched() -> None:
        done = python(str(HERE / "guarded_backward.py"))
        assert done.returncode == 0, f"{done.stdout[-300:]}{done.stderr[-2000:]}"
