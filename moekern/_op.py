"""What an op is, how it is registered with torch, and how a backend is chosen.

An op is described once, by an `OpSpec`. From it come the functional torch op `moekern::<name>`, its fake kernel, its
autograd twin `moekern::<name>_autograd`, the op tests, the benchmarks and the table in the docs.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# Ops are defined from Python so that an install without the native library still imports. The fragment has to stay
# referenced: torch drops the registrations when it is collected.
_LIBRARY = torch.library.Library("moekern", "FRAGMENT")

BACKEND_NAMES = ("ref", "cpu", "triton", "cuda")


def never(**_: Any) -> None:
    """The `supports` of a backend that takes every argument the op's check lets through."""
    return None


@dataclass(frozen=True, eq=False)  # hashed by identity: `unavailable` looks it up at each call
class Backend:
    """One implementation of an op.

    run: called with every argument of the schema by keyword; returns what the schema says.
    available: why this backend cannot run on this machine at all, or None when it can. Called once.
    supports: why it cannot take these arguments (dtype, device, size), or None when it can. Called at each dispatch.
    """

    run: Callable[..., Any]
    available: Callable[[], str | None] = lambda: None
    supports: Callable[..., str | None] = never


@dataclass(frozen=True)
class Case:
    """One input of an op, used by the tests and, when `bench` names the model shape it stands for, by the benchmarks.

    make(generator, dtype, device) returns the op's arguments by keyword; floating inputs that carry model data are of
    `dtype`. `small` cases finish in well under a second on every backend, the Triton interpreter included.
    """

    id: str
    make: Callable[[torch.Generator, torch.dtype, torch.device], dict[str, Any]]
    small: bool = True
    bench: str | None = None


@dataclass(frozen=True)
class Backward:
    """Gradient of an op: run(saved, grads) -> {argument name: gradient}.

    saved maps every argument name to its value and "outputs" to the tuple of outputs; grads has one entry per output
    (None where nothing flows back). `inputs` names the differentiable arguments.
    """

    inputs: tuple[str, ...]
    run: Callable[[Mapping[str, Any], tuple[torch.Tensor | None, ...]], dict[str, torch.Tensor | None]]


@dataclass(frozen=True)
class OpSpec:
    """The whole description of an op.

    schema: arguments and returns in torch's schema language, without the name and without `backend`.
    check: raises ValueError or TypeError for arguments that the op does not take; sees every argument by keyword.
    ref: the definition, plain PyTorch, fp32 inside (fp64 when the inputs are fp64).
    fake: shapes and dtypes of the outputs.
    model: what transformers' own code computes with these arguments, in the model's dtype; the yardstick of the numeric
        tests (our error against an fp64 `ref` may be at most 1.25 times its error) and the peer of the benchmarks.
    choose: names of the backends to try, best first, from the arguments; a pure function.
    outputs: kind per output: "model" (bf16/fp16 yardstick), "fp32" (4 x a sequential fp32 sum), "ids", "exact".
    flops, bytes: work and minimal traffic of a call.
    """

    name: str
    schema: str
    check: Callable[..., None]
    ref: Callable[..., Any]
    fake: Callable[..., Any]
    backends: Mapping[str, Backend]
    cases: Sequence[Case]
    flops: Callable[..., int]
    bytes: Callable[..., int]
    outputs: tuple[str, ...]
    model: Callable[..., Any] | None = None
    backward: Backward | None = None
    choose: Callable[..., Sequence[str]] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    defaults: dict[str, Any] = field(init=False, repr=False)
    arguments: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parsed = torch._C.parse_schema(f"moekern::{self.name}{self.schema}")
        object.__setattr__(self, "arguments", tuple(a.name for a in parsed.arguments))
        defaults = {a.name: a.default_value for a in parsed.arguments if a.has_default_value()}
        # Interned, so that `call` knows a default string by identity.
        interned = {n: sys.intern(v) if isinstance(v, str) else v for n, v in defaults.items()}
        object.__setattr__(self, "defaults", interned)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Every argument by keyword: torch leaves out what equals its default."""
        bound = dict(self.defaults)
        bound.update(zip(self.arguments, args, strict=False))
        bound.update(kwargs)
        return bound


@functools.cache
def unavailable(backend: Backend) -> str | None:
    """Why a backend cannot run on this machine (cached), or None."""
    return backend.available()


def default_order(device_type: str) -> tuple[str, ...]:
    """Backends to try, best first. CUDA C++ is left out until a measured row shows it fastest for an op."""
    return ("cpu", "ref") if device_type == "cpu" else ("triton", "ref")


def select(spec: OpSpec, arguments: dict[str, Any], forced: str | None) -> Backend:
    """The backend for one call: forced by argument or by MOEKERN_BACKEND, else the first that can take it."""
    forced = forced or os.environ.get("MOEKERN_BACKEND") or None
    if forced is not None:
        if forced not in BACKEND_NAMES:
            raise ValueError(
                f"{spec.name}: unknown backend {forced!r} (argument or MOEKERN_BACKEND); "
                f"expected one of {', '.join(BACKEND_NAMES)}"
            )
        backend = spec.backends.get(forced)
        if backend is None:
            reason: str | None = f"{spec.name} has no {forced} implementation"
        else:
            reason = unavailable(backend) or backend.supports(**arguments)
        if backend is None or reason is not None:
            raise RuntimeError(f"{spec.name}: backend {forced!r} was forced but cannot run: {reason}")
        return backend
    if spec.choose is not None:
        order = spec.choose(**arguments)
    else:
        # In the order of the schema: `arguments` begins with the defaults.
        for argument in spec.arguments:
            first = arguments[argument]
            if isinstance(first, torch.Tensor):
                break
        order = default_order(first.device.type)
    for name in order:
        backend = spec.backends.get(name)
        if backend is not None and unavailable(backend) is None and backend.supports(**arguments) is None:
            return backend
    return spec.backends["ref"]


def backends_of(spec: OpSpec) -> dict[str, str | None]:
    """For each backend name: None when it is available here, else the reason why not."""
    return {
        name: unavailable(spec.backends[name])
        if name in spec.backends
        else f"{spec.name} has no {name} implementation"
        for name in BACKEND_NAMES
    }


def register(spec: OpSpec) -> None:
    """Defines `moekern::<name>` and, when it has a backward, `moekern::<name>_autograd`."""
    head, returns = spec.schema.rsplit("->", 1)
    # The keyword-only marker is there already or is added: `backend` never is positional.
    arguments = head.strip()[1:-1]
    keyword = "" if "*" in arguments else "*, "
    schema = f"({arguments}, {keyword}str? backend=None) ->{returns}"

    def run(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        bound = spec.bind(args, kwargs)
        spec.check(**bound)
        return select(spec, bound, backend).run(**bound)

    def fake(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        bound = spec.bind(args, kwargs)
        spec.check(**bound)
        return spec.fake(**bound)

    _define(spec.name, schema, run, fake)
    if spec.backward is not None:
        # register_autograd takes no keyword-only tensors, so the twin's arguments are all positional. It is a twin,
        # not the op itself, because an Autograd key in Python costs every inference call about 2 us.
        positional = schema.replace("*, ", "")
        _define(f"{spec.name}_autograd", positional, _positional(spec, run), _positional(spec, fake))
        _register_backward(spec, spec.backward)


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    _LIBRARY.define(name + schema, tags=tags)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moekern::{name}", fake, lib=_LIBRARY)


def _positional(spec: OpSpec, fn: Callable[..., Any]) -> Callable[..., Any]:
    names = (*spec.arguments, "backend")

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = dict(zip(names, args, strict=False))
        bound.update(kwargs)
        return fn(**bound)

    return call


def _register_backward(spec: OpSpec, backward: Backward) -> None:
    names = (*spec.arguments, "backend")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [v for v in inputs if isinstance(v, torch.Tensor)]
        ctx.save_for_backward(*tensors, *outputs)
        ctx.template = [None if isinstance(v, torch.Tensor) else (v,) for v in inputs]
        ctx.num_tensors = len(tensors)

    def run(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors[: ctx.num_tensors])
        values = [next(tensors) if v is None else v[0] for v in ctx.template]
        saved: dict[str, Any] = dict(zip(names, values, strict=False))
        saved["outputs"] = tuple(ctx.saved_tensors[ctx.num_tensors :])
        saved["needs"] = {n for n, need in zip(names, ctx.needs_input_grad, strict=False) if need}
        found = backward.run(saved, grads)
        return tuple(found.get(n) for n in names[: len(values)])

    torch.library.register_autograd(f"moekern::{spec.name}_autograd", run, setup_context=setup, lib=_LIBRARY)


def call(spec: OpSpec, backend: str | None, **arguments: Any) -> Any:
    """Calls the op, through its autograd twin only when a gradient is wanted."""
    ops = torch.ops.moekern
    if spec.backward is not None and torch.is_grad_enabled():
        for name in spec.backward.inputs:
            value = arguments[name]
            if value is not None and value.requires_grad:
                values = [arguments[n] for n in spec.arguments]
                return getattr(ops, f"{spec.name}_autograd")(*values, backend)
    if torch.compiler.is_compiling():  # a comparison with a default would specialise a symbolic size
        return getattr(ops, spec.name)(**arguments, backend=backend)
    # torch takes 0.2 us to convert an argument, and leaves out what equals its default again on the way to `run`.
    defaults = spec.defaults
    given = {}
    for n, v in arguments.items():
        default = defaults.get(n, defaults)  # `defaults` itself stands for none: no argument is that dict
        if v is not default and not (type(v) is float and v == default):
            given[n] = v
    if backend is not None:
        given["backend"] = backend
    return getattr(ops, spec.name).default(**given)
