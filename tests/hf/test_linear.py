"""Patched nn.Linear layers: few rows by grouped_gemm, everything else by torch, and which layers are left alone."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf.families import build, cast, generate, outputs, prompt
from torch import nn

import moekern
from moekern.hf import linear

WIDTH = 1024  # squared: the smallest layer that is patched
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Counts the rows of the grouped_gemm calls."""
    counts: Counter[int] = Counter()
    original = moekern.ops.grouped_gemm

    def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        counts[x.shape[0]] += 1
        return original(x, *args, **kwargs)

    monkeypatch.setattr(moekern.ops, "grouped_gemm", counted)
    return counts


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have only layers below the size that gains."""
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)


def _layer(dtype: torch.dtype, bias: bool = False, inputs: int = WIDTH, outputs: int = WIDTH) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


def _beside(*layers: nn.Module) -> nn.ModuleList:
    """The layers in a model that has experts."""
    return nn.ModuleList([build("mixtral"), *layers])


def _linears(report: moekern.hf.Report) -> dict[str, str | None]:
    return {entry.name: entry.reason for entry in report.entries if entry.kind == "linear"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_error_against_fp64(dtype: torch.dtype, bias: bool, calls: Counter[int]) -> None:
    layer = _layer(dtype, bias, 1088, 1000)
    exact_layer = copy.deepcopy(layer).double()
    moekern.patch(_beside(layer))
    for rows in range(1, 18):
        x = torch.randn(rows, 1088, generator=torch.Generator().manual_seed(rows)).to(dtype)
        exact, own = exact_layer(x.double()), F.linear(x, layer.weight, layer.bias)
        found = layer(x)
        assert found.dtype == dtype
        assert found.shape == own.shape
        assert (found.double() - exact).norm() <= 1.25 * (own.double() - exact).norm()
        assert torch.equal(layer(x.expand(1, rows, -1)), found.unsqueeze(0))
    assert calls == Counter(dict.fromkeys(range(1, linear.MAX_ROWS[dtype] + 1), 2))  # more are torch's


def test_wrong_weights_are_seen(calls: Counter[int]) -> None:
    """The bound of the test above tells a layer that lost one weight row from one that did not."""
    layer, x = _layer(torch.bfloat16), torch.randn(3, WIDTH).bfloat16()
    exact, own = F.linear(x.double(), layer.weight.double()), layer(x)
    moekern.patch(_beside(layer))
    layer.weight = nn.Parameter(
        layer.weight.clone(), requires_grad=False
    )  # and weights are read at each call
    layer.weight[5] = 0
    found = layer(x)
    assert calls[3] == 1
    assert (found.double() - exact).norm() > 1.25 * (own.double() - exact).norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_calls_that_are_torchs(dtype: torch.dtype, calls: Counter[int]) -> None:
    layer = _layer(dtype, bias=True)
    own = copy.deepcopy(layer)
    moekern.patch(_beside(layer))
    x = torch.randn(2, WIDTH).to(dtype)
    assert torch.equal(layer(x[:0]), own(x[:0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x.float()), own(x.float()))
        assert torch.equal(layer(x), own(x))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x.float())
    with pytest.raises(RuntimeError, match="shapes"):
        layer(x[:, 1:])
    for module in (layer, own):
        module.weight.requires_grad_(True)
        module(x).float().square().sum().backward()
    assert own.weight.grad is not None
    assert torch.equal(layer.weight.grad, own.weight.grad)
    assert not calls
    with torch.no_grad():
        layer(x)
    assert calls == Counter({2: 1})


def test_which_layers(calls: Counter[int]) -> None:
    class Adapted(nn.Linear):
        pass

    strided = _layer(torch.bfloat16)
    strided.weight = nn.Parameter(strided.weight.t(), requires_grad=False)
    hooked, replaced = _layer(torch.bfloat16), _layer(torch.bfloat16)
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    replaced.forward = replaced.forward  # type: ignore[method-assign]
    offloaded = _layer(torch.bfloat16)
    offloaded._hf_hook = object()  # type: ignore[assignment]
    model = _beside(
        _layer(torch.bfloat16), strided, hooked, replaced, offloaded, _layer(torch.float32),
        _layer(torch.bfloat16, outputs=WIDTH - 1), Adapted(WIDTH, WIDTH, dtype=torch.bfloat16),
        nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16, device="meta"),
    )  # fmt: skip
    report = moekern.patch(model)
    assert _linears(report) == {
        "1": None,
        "2": "its weight is strided",
        "3": "it has hooks",
        "4": "its forward is replaced on the instance already",
        "5": "an accelerate hook moves its weights",
    }
    assert "forward" not in Adapted.__dict__
    assert not _linears(moekern.patch(_beside(_layer(torch.bfloat16)), linear=False))


def test_class_changed_after_patching() -> None:
    class Adapted(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    layer, x = _layer(torch.bfloat16), torch.randn(2, WIDTH).bfloat16()
    own = layer(x)
    moekern.patch(_beside(layer))
    layer.__class__ = Adapted
    assert torch.equal(layer(x), own + 1)


def test_dense_models_are_left_alone() -> None:
    layer = _layer(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"Sequential has nothing to patch; looked for: experts, router, mla$"
    ):
        moekern.patch(nn.Sequential(layer))
    assert "forward" not in layer.__dict__
    # Beside experts that were not asked for, linear layers alone are enough.
    report = moekern.patch(_beside(layer), experts=False, router=False, mla=False)
    assert _linears(report) == {"1": None}
    assert len(report.entries) == 1


def test_report_is_one_line() -> None:
    report = moekern.patch(_beside(*(_layer(torch.bfloat16) for _ in range(12))))
    lines = [line.split() for line in str(report).splitlines() if line.split()[0] == "linear"]
    assert lines == [["linear", "Linear", "12", "patched"]]


def test_no_kernel_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        linear._common, "reason_without_kernel", lambda op, device, **_: f"no kernel for {op}"
    )
    layer = _layer(torch.bfloat16)
    assert _linears(moekern.patch(_beside(layer))) == {"1": "no kernel for grouped_gemm"}
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "gpt_oss", "qwen3_moe"])
@pytest.mark.usefixtures("every_size")
def test_models(name: str, calls: Counter[int]) -> None:
    model, ids = cast(build(name), torch.bfloat16), prompt()
    before = outputs(model, ids)
    state = {path: dict(module.__dict__) for path, module in model.named_modules()}
    report = moekern.patch(model)
    patched = _linears(report)
    assert "lm_head" in patched
    assert set(patched.values()) == {None}
    assert not any(path.endswith("kv_b_proj") for path in patched)
    assert moekern.patch(model) == report
    generate(model, ids, 4)
    assert calls[2] >= len(patched)  # the two rows of a decode step
    after = outputs(model, ids[:1])
    assert (after - before[:1]).float().norm() <= 0.05 * before[
        :1
    ].float().norm()  # rounding; wrong is above 1
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(outputs(other, ids[:1]), after)
        nn.init.zeros_(other.lm_head.weight)  # a copy that ran the original's layers would not notice
        assert not outputs(other, ids[:1]).any()
    moekern.unpatch(model)
    assert {path: dict(module.__dict__) for path, module in model.named_modules()} == state
    assert torch.equal(outputs(model, ids), before)


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("order", [("mla", "linear"), ("linear", "mla")])
def test_kinds_in_any_order(order: tuple[str, ...]) -> None:
    kinds = ("experts", "router", "mla", "linear")
    model = cast(build("deepseek_v2"), torch.bfloat16)
    together = moekern.patch(copy.deepcopy(model))
    for kind in order:
        report = moekern.patch(model, **{name: name == kind for name in kinds})
        assert {(entry.kind, entry.reason) for entry in report.entries} == {(kind, None)}
    assert moekern.patch(model) == together


@pytest.mark.filterwarnings("error:.*cache")
@pytest.mark.parametrize("rows", [2, 17])
def test_compiles_fullgraph(rows: int, calls: Counter[int]) -> None:
    layer, x = _layer(torch.bfloat16, bias=True), torch.randn(rows, WIDTH).bfloat16()
    moekern.patch(_beside(layer))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
        assert torch.equal(
            torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)(x), layer(x)
        )
