"""Everything that follows from an op's SPEC, for each op, backend, dtype and case."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
import yardstick
from support import (
    backend_of,
    best_cpu,
    call,
    device_of,
    evaluate,
    grid,
    make,
    mutated,
    same_bits,
    use_variant,
)
from torch import Tensor

import moekern
from moekern import _op
from moekern._op import Case, OpSpec
from moekern.ops import SPECS

ALL = [pytest.param(spec, id=name) for name, spec in SPECS.items()]
DIFFERENTIABLE = [pytest.param(spec, id=name) for name, spec in SPECS.items() if spec.backward is not None]


def public(spec: OpSpec) -> Any:
    return getattr(moekern.ops, spec.name)


def small_cases(spec: OpSpec) -> list[Case]:
    return [case for case in spec.cases if case.small]


def work(spec: OpSpec, case: Case) -> int:
    """Elements of a case: what its tests cost."""
    return sum(v.numel() for v in make(spec, case, torch.float32).values() if isinstance(v, Tensor))


@functools.cache
def _ranked(name: str) -> tuple[int, ...]:
    """Indices of an op's small cases that have data, the least first."""
    spec = SPECS[name]
    sizes = (
        (work(spec, case), i) for i, case in enumerate(spec.cases) if case.small and has_rows(spec, case)
    )
    return tuple(i for size, i in sorted(sizes) if size > 1)


def light_cases(spec: OpSpec, count: int) -> list[Case]:
    """The cases with the least data that have any, for tests whose cost does not come from the kernel."""
    return [spec.cases[i] for i in sorted(_ranked(spec.name)[:count])]


def has_rows(spec: OpSpec, case: Case) -> bool:
    return all(v.numel() for v in make(spec, case, torch.float32).values() if isinstance(v, Tensor))


def light(count: int, specs: list[Any] = ALL) -> list[Any]:
    return [
        pytest.param(param.values[0], case, id=f"{param.id}-{case.id}")
        for param in specs
        for case in light_cases(param.values[0], count)
    ]


def interpreted(variant: str) -> bool:
    """A Triton program takes about 9 ms in the interpreter, so its grids are thinner."""
    return variant == "triton" and device_of(variant).type == "cpu"


def affordable(spec: OpSpec, variant: str, dtype: torch.dtype, case: Case) -> bool:
    return not interpreted(variant) or dtype == torch.float32 or case in light_cases(spec, 3)


def is_default(spec: OpSpec, variant: str) -> bool:
    """What users run: the best instruction set, or the GPU."""
    return variant == best_cpu(spec) != "ref" or device_of(variant).type == "cuda"


@pytest.mark.parametrize(("spec", "variant", "dtype", "case"), grid(keep=affordable))
def test_numerics(spec: OpSpec, variant: str, dtype: torch.dtype, case: Case) -> None:
    """Right by the yardstick, and of the shapes, dtypes and strides that the fake promises to a compiler."""
    for arguments, found in yardstick.check_case(spec, variant, dtype, case):
        check_layout(spec, arguments, found)


def check_layout(spec: OpSpec, arguments: dict[str, Any], found: tuple[Tensor, ...]) -> None:
    expected = spec.fake(**arguments)
    expected = () if expected is None else expected if isinstance(expected, tuple) else (expected,)
    assert len(found) == len(expected) + len(mutated(spec))
    inputs = {
        v.untyped_storage().data_ptr() for v in arguments.values() if isinstance(v, Tensor) and v.numel()
    }
    for i, (a, b) in enumerate(zip(found, expected, strict=False)):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), f"output {i}"
        strides = [
            (s, t) for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if n > 1 and a.numel()
        ]
        assert all(s == t for s, t in strides), (
            f"output {i}: strides {a.stride()}, the fake says {b.stride()}"
        )
        assert a.numel() == 0 or a.untyped_storage().data_ptr() not in inputs, (
            f"output {i} is a view of an input"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "variant", "dtype", "case"),
    grid(
        dtypes=(torch.bfloat16,),
        cases=lambda c: not c.small,
        only=lambda s, v: v == best_cpu(s) != "ref",
        keep=lambda s, v, dtype, case: case is next(c for c in s.cases if not c.small),
    ),
)
def test_numerics_of_model_shapes(spec: OpSpec, variant: str, dtype: torch.dtype, case: Case) -> None:
    yardstick.check_case(spec, variant, dtype, case)


@pytest.mark.parametrize(
    ("spec", "variant", "dtype", "case"), grid(dtypes=(torch.bfloat16,), only=is_default)
)
def test_same_bits_on_every_run(spec: OpSpec, variant: str, dtype: torch.dtype, case: Case) -> None:
    arguments = make(spec, case, dtype, device=device_of(variant))
    before = {n: v.clone() for n, v in arguments.items() if isinstance(v, Tensor)}
    first = call(spec, variant, arguments)
    for i, (a, b) in enumerate(zip(first, call(spec, variant, arguments), strict=True)):
        assert same_bits(a, b), f"output {i} differs between two runs"
    for name, value in before.items():
        assert same_bits(value, arguments[name]), f"{name} was changed"


def strided_copy(value: Tensor) -> Tensor:
    """The same values with gaps between the rows; the last dimension stays contiguous."""
    whole = torch.full((*value.shape[:-1], value.shape[-1] + 3), float("nan") if value.is_floating_point() else -7,
                       dtype=value.dtype, device=value.device)  # fmt: skip
    whole[..., 1 : 1 + value.shape[-1]] = value
    return whole[..., 1 : 1 + value.shape[-1]]


@pytest.mark.parametrize(
    ("spec", "variant", "dtype", "case"),
    grid(
        dtypes=(torch.float32, torch.bfloat16),
        only=lambda s, v: is_default(s, v) or interpreted(v),
        keep=lambda s, v, dtype, case: not interpreted(v) or case in light_cases(s, 2),
    ),
)
def test_rows_with_gaps(spec: OpSpec, variant: str, dtype: torch.dtype, case: Case) -> None:
    """Non-contiguous inputs give the bits of contiguous ones; what the op refuses, it refuses with a ValueError."""
    arguments = make(spec, case, dtype, device=device_of(variant))
    names = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.dim() >= 2]
    gapped = {**arguments, **{n: strided_copy(arguments[n]) for n in names}}
    expected = call(spec, variant, arguments)
    for i, (a, b) in enumerate(zip(call(spec, variant, gapped), expected, strict=True)):
        assert same_bits(a, b), f"output {i} depends on the strides of {', '.join(names)}"


@pytest.mark.parametrize(("spec", "case"), light(3))
def test_opcheck(spec: OpSpec, case: Case) -> None:
    arguments = make(spec, case, torch.float32)
    op = getattr(torch.ops.moekern, spec.name).default
    torch.library.opcheck(op, (), arguments)


@pytest.mark.parametrize(("spec", "case"), light(2, DIFFERENTIABLE))
def test_opcheck_of_the_autograd_twin(spec: OpSpec, case: Case) -> None:
    assert spec.backward is not None
    arguments = make(spec, case, torch.float32)
    for name in spec.backward.inputs:
        if arguments[name] is not None:
            arguments[name] = arguments[name].detach().requires_grad_()
    op = getattr(torch.ops.moekern, f"{spec.name}_autograd").default
    torch.library.opcheck(op, tuple(arguments[n] for n in spec.arguments))


def compiled_equals_eager(spec: OpSpec, arguments: dict[str, Any], dynamic: bool) -> None:
    def function(**kwargs: Any) -> Any:
        return _op.call(spec, None, **kwargs)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    found, expected = evaluate(spec, compiled, arguments), evaluate(spec, function, arguments)
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("spec", "case"), light(2))
def test_compile(spec: OpSpec, case: Case, dynamic: bool) -> None:
    compiled_equals_eager(spec, make(spec, case, torch.bfloat16), dynamic)


@pytest.mark.parametrize(("spec", "case"), light(1, DIFFERENTIABLE))
def test_compiled_gradient(spec: OpSpec, case: Case) -> None:
    eager = gradients(spec, best_cpu(spec), make(spec, case, torch.float32), compiled=False)
    compiled = gradients(spec, best_cpu(spec), make(spec, case, torch.float32), compiled=True)
    assert eager.keys() == compiled.keys()
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-6, atol=1e-6)


def differentiable(spec: OpSpec, arguments: dict[str, Any]) -> dict[str, Tensor]:
    assert spec.backward is not None
    return {n: arguments[n] for n in spec.backward.inputs if arguments[n] is not None}


def loss_of(outputs: tuple[Tensor, ...]) -> Tensor:
    """A scalar that depends on every element of every floating output, each differently."""
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        if output.is_floating_point() and output.requires_grad:
            ramp = torch.linspace(0.5, 1.5, max(output.numel(), 1), dtype=torch.float64)[: output.numel()]
            finite = output.double().masked_fill(~output.isfinite(), 0)
            total = total + (finite.flatten() * ramp * ((-1.0) ** torch.arange(ramp.numel()))).sum()
    return total


def gradients(
    spec: OpSpec, variant: str, arguments: dict[str, Any], compiled: bool = False
) -> dict[str, Tensor]:
    """Gradient of `loss_of` by the op's own backward."""
    leaves = {n: v.detach().requires_grad_() for n, v in differentiable(spec, arguments).items()}

    def function(**kwargs: Any) -> Tensor:
        result = _op.call(spec, backend_of(variant), **kwargs)
        return loss_of(result if isinstance(result, tuple) else (result,))

    if compiled:
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with use_variant(variant):
        found = torch.autograd.grad(function(**{**arguments, **leaves}), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def reference_gradients(spec: OpSpec, function: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Gradient of `loss_of` by torch's autograd through plain PyTorch code."""
    leaves = {n: v.detach().requires_grad_() for n, v in differentiable(spec, arguments).items()}
    result = function(**{**arguments, **leaves})
    loss = loss_of(result if isinstance(result, tuple) else (result,))
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}


@pytest.mark.parametrize(
    ("spec", "variant", "dtype", "case"),
    grid(
        dtypes=(torch.float32, torch.bfloat16),
        specs=lambda s: s.backward is not None,
        only=lambda s, v: v in ("ref", best_cpu(s)) or interpreted(v),
        keep=lambda s, v, dtype, case: case in light_cases(s, 10 if v == "ref" else 3),
    ),
)
def test_gradients(spec: OpSpec, variant: str, dtype: torch.dtype, case: Case) -> None:
    arguments = make(spec, case, dtype)
    if not has_rows(spec, case):
        pytest.skip("nothing to differentiate")
    # Inputs that are never read may be NaN; autograd through a mask would multiply them by 0.
    readable = {n: v.nan_to_num(0) if isinstance(v, Tensor) and v.is_floating_point() else v
                for n, v in arguments.items()}  # fmt: skip
    truth = reference_gradients(spec, spec.ref, yardstick.in_fp64(readable))
    plain = reference_gradients(spec, spec.ref, readable)
    found = gradients(spec, variant, arguments)
    for name, gradient in found.items():
        assert gradient.dtype == arguments[name].dtype
        assert gradient.shape == arguments[name].shape
        yardstick.check_error([gradient], [truth[name]], [plain[name]], "model", dtype,
                              yardstick.sum_length(arguments), f"gradient of {name}",
                              slack=1.5)  # one sample: the largest of a few hundred errors varies  # fmt: skip


@pytest.mark.parametrize(("spec", "case"), light(4, DIFFERENTIABLE))
def test_gradcheck(spec: OpSpec, case: Case) -> None:
    """The op's own backward against finite differences of ref, in fp64."""
    if "ties" in case.id:
        pytest.skip("the selection jumps at a tie")
    arguments = yardstick.in_fp64(make(spec, case, torch.float64))
    leaves = {n: v.detach().requires_grad_() for n, v in differentiable(spec, arguments).items()}

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        result = _op.call(spec, "ref", **{**arguments, **dict(zip(leaves, values, strict=True))})
        outputs = result if isinstance(result, tuple) else (result,)
        return tuple(o for o in outputs if o.is_floating_point())

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_only_asked_gradients_are_computed(spec: OpSpec) -> None:
    """One differentiable input at a time: the others get none and nothing fails."""
    for case in light_cases(spec, 2):
        arguments = make(spec, case, torch.float32)
        everything = gradients(spec, "ref", arguments)
        for name, value in differentiable(spec, arguments).items():
            leaf = value.detach().requires_grad_()
            result = _op.call(spec, "ref", **{**arguments, name: leaf})
            loss = loss_of(result if isinstance(result, tuple) else (result,))
            (gradient,) = torch.autograd.grad(loss, [leaf])
            torch.testing.assert_close(gradient, everything[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", ALL)
def test_public_function_passes_every_argument_on(spec: OpSpec) -> None:
    signature = inspect.signature(public(spec))
    missing = set(spec.arguments) - set(signature.parameters)
    assert not missing, f"the function lacks {missing}"
    assert signature.parameters["backend"].default is None
    for name, value in spec.defaults.items():
        assert signature.parameters[name].default == value, f"default of {name}"
    seen: dict[str, Any] = {}

    def record(_: OpSpec, backend: str | None, **arguments: Any) -> Any:
        seen.update(arguments, backend=backend)
        return None, None

    sentinels = {name: object() for name in (*spec.arguments, "backend")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_op, "call", record)
        public(spec)(**sentinels)
    assert seen == sentinels


@pytest.mark.parametrize("spec", ALL)
def test_cases_cover_empty_and_single_inputs(spec: OpSpec) -> None:
    """T = 0 and T = 1 are in every op's cases; the rest of this file runs them on every backend."""
    empty = [c for c in small_cases(spec) if not has_rows(spec, c)]
    single = [
        c for c in small_cases(spec)
        if any(isinstance(v, Tensor) and v.shape[0] == 1 for v in make(spec, c, torch.float32).values())
    ]  # fmt: skip
    assert empty, "no case without tokens"
    assert single, "no case with one token"
    assert len({c.id for c in spec.cases}) == len(spec.cases), "two cases have one id"


@pytest.mark.parametrize("spec", ALL)
def test_work_is_counted(spec: OpSpec) -> None:
    for case in small_cases(spec):
        arguments = make(spec, case, torch.bfloat16)
        assert spec.flops(**arguments) >= 0
        assert spec.bytes(**arguments) >= 0
        if case.bench is not None:
            assert spec.bytes(**arguments) > 0


@pytest.mark.parametrize("spec", ALL)
def test_meta_tensors_give_meta_results(spec: OpSpec) -> None:
    case = light_cases(spec, 1)[0]
    arguments = make(spec, case, torch.float32)
    expected = evaluate(spec, spec.ref, arguments)
    on_meta = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in arguments.items()}
    result = _op.call(spec, None, **on_meta)
    outputs = () if result is None else result if isinstance(result, tuple) else (result,)
    for got, want in zip(outputs, expected[: len(outputs)], strict=True):
        assert got.device.type == "meta"
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
