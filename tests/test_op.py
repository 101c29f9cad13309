"""The op machinery: how arguments are bound and a backend is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moekern
from moekern import _op
from moekern._op import Backend, OpSpec
from moekern.ops import SPECS, gate_topk


def spec_with(backends: dict[str, Backend], **changes: Any) -> OpSpec:
    fields: dict[str, Any] = {
        "name": "example", "schema": "(Tensor x, int k, *, float scale=2.0, Tensor? y=None) -> Tensor",
        "check": lambda **_: None, "ref": None, "fake": None, "backends": backends, "cases": (),
        "flops": None, "bytes": None, "outputs": ("model",),
    }  # fmt: skip
    return OpSpec(**{**fields, **changes})


def returns(name: str, **rest: Any) -> Backend:
    return Backend(lambda **_: name, **rest)


X = torch.ones(2)
ARGUMENTS = {"x": X, "k": 1, "scale": 2.0, "y": None}


def test_bind_fills_in_the_defaults() -> None:
    spec = spec_with({})
    assert spec.arguments == ("x", "k", "scale", "y")
    assert spec.defaults == {"scale": 2.0, "y": None}
    assert spec.bind((X, 3), {}) == {"x": X, "k": 3, "scale": 2.0, "y": None}
    assert spec.bind((X,), {"k": 4, "scale": 1.0}) == {"x": X, "k": 4, "scale": 1.0, "y": None}


def test_bind_does_not_change_the_defaults() -> None:
    spec = spec_with({})
    spec.bind((X, 3), {"scale": 5.0})
    assert spec.bind((X, 3), {})["scale"] == 2.0


@pytest.fixture
def three() -> OpSpec:
    return spec_with({
        "ref": returns("ref"),
        "cpu": returns("cpu", supports=lambda k, **_: "k is odd" if k % 2 else None),
        "cuda": returns("cuda", available=lambda: "no GPU"),
    })  # fmt: skip


def chosen(spec: OpSpec, forced: str | None = None, **changes: Any) -> str:
    arguments = {**ARGUMENTS, **changes}
    return _op.select(spec, arguments, forced).run(**arguments)


def test_the_best_backend_that_takes_the_arguments_is_chosen(three: OpSpec) -> None:
    assert chosen(three, k=2) == "cpu"
    assert chosen(three, k=1) == "ref"


def test_choose_decides_the_order(three: OpSpec) -> None:
    spec = spec_with(dict(three.backends), choose=lambda **_: ("cuda", "ref", "cpu"))
    assert chosen(spec, k=2) == "ref"


def test_a_forced_backend_is_used(three: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(three, "ref", k=2) == "ref"
    monkeypatch.setenv("MOEKERN_BACKEND", "ref")
    assert chosen(three, k=2) == "ref"
    assert chosen(three, "cpu", k=2) == "cpu"  # the argument before the environment
    monkeypatch.setenv("MOEKERN_BACKEND", "")
    assert chosen(three, k=2) == "cpu"


@pytest.mark.parametrize(
    ("forced", "k", "reason"),
    [("triton", 2, "example has no triton implementation"), ("cuda", 2, "no GPU"), ("cpu", 1, "k is odd")],
)
def test_a_forced_backend_that_cannot_run_is_an_error(
    three: OpSpec, forced: str, k: int, reason: str
) -> None:
    message = f"example: backend '{forced}' was forced but cannot run: {reason}"
    with pytest.raises(RuntimeError, match=message):
        chosen(three, forced, k=k)


UNKNOWN = r"unknown backend 'nope' \(argument or MOEKERN_BACKEND\); expected one of ref, cpu, triton, cuda"


def test_an_unknown_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="gate_topk: " + UNKNOWN):
        gate_topk(torch.randn(2, 4), 1, backend="nope")
    monkeypatch.setenv("MOEKERN_BACKEND", "nope")
    with pytest.raises(ValueError, match="gate_topk: " + UNKNOWN):
        gate_topk(torch.randn(2, 4), 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CUDA backend runs here")
def test_a_backend_that_is_not_built_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"gate_topk: backend 'cuda' was forced but cannot run: .+"):
        gate_topk(torch.randn(2, 4), 1, backend="cuda")


@pytest.mark.parametrize("name", SPECS)
def test_backends_are_listed_with_reasons(name: str) -> None:
    listed = moekern.backends(name)
    assert list(listed) == ["ref", "cpu", "triton", "cuda"]
    assert listed["ref"] is None
    for reason in listed.values():
        assert reason is None or len(reason) > 10


def test_availability_is_asked_once() -> None:
    asked = []
    backend = returns("cpu", available=lambda: asked.append(1))
    spec = spec_with({"ref": returns("ref"), "cpu": backend})
    assert [chosen(spec), chosen(spec)] == ["cpu", "cpu"]
    assert len(asked) == 1


def test_a_gradient_is_recorded_only_when_wanted() -> None:
    logits = torch.randn(3, 8, requires_grad=True)
    assert gate_topk(logits, 2)[0].requires_grad
    with torch.no_grad():
        assert not gate_topk(logits, 2)[0].requires_grad
    assert not gate_topk(logits.detach(), 2)[0].requires_grad
