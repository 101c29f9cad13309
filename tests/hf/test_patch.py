"""patch, unpatch, patched: what changes on a model, what does not, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from hf.families import build, generate, outputs, prompt
from torch import nn

import moekern


def test_report_lists_modules_and_prints_a_table() -> None:
    model = build("phimoe")
    report = moekern.patch(model)
    assert [entry.name for entry in report.patched] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert {entry.kind for entry in report.skipped} == {"router"}
    lines = str(report).splitlines()
    assert lines[0] == "moekern: 2 modules patched, 2 skipped"
    assert lines[1].split() == ["experts", "PhimoeExperts", "2", "patched"]
    assert "skipped: sparsemixer" in lines[2]


@pytest.mark.parametrize("kind", ["experts", "router", "mla"])
def test_only_what_is_asked_for(kind: str) -> None:
    report = moekern.patch(
        build("deepseek_v2"), **{name: name == kind for name in ("experts", "router", "mla")}
    )
    assert {entry.kind for entry in report.entries} == {kind}


def test_nothing_to_patch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Linear has nothing to patch; looked for: experts, router, mla"):
        moekern.patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="MixtralForCausalLM has nothing to patch; looked for: mla"):
        moekern.patch(build("mixtral"), experts=False, router=False)


def test_idempotent() -> None:
    model = build("deepseek_v3")
    first = moekern.patch(model)
    state = {path: dict(module.__dict__) for path, module in model.named_modules()}
    assert moekern.patch(model) == first
    assert {path: dict(module.__dict__) for path, module in model.named_modules()} == state
    moekern.unpatch(model)
    moekern.unpatch(model)
    assert all("_moekern" not in module.__dict__ for module in model.modules())


def test_disabled_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEKERN_DISABLE", "1")
    model = build("mixtral")
    report = moekern.patch(model)
    assert not report.patched
    assert {entry.reason for entry in report.skipped} == {"MOEKERN_DISABLE is set"}
    assert all("_moekern" not in module.__dict__ for module in model.modules())


def test_context_manager_restores_what_it_changed_and_no_more() -> None:
    model = build("deepseek_v3")
    moekern.patch(model, experts=False, mla=False)
    with moekern.patched(model) as report:
        assert len(report.patched) == 6
    kinds = {module._moekern.kind for module in model.modules() if hasattr(module, "_moekern")}
    assert kinds == {"router"}
    with pytest.raises(RuntimeError, match="inside"), moekern.patched(model):
        raise RuntimeError("inside")
    assert "config" not in {
        key for module in model.modules() for key in getattr(module, "_moekern", _EMPTY).replaced
    }


class _EMPTY:
    replaced: tuple[str, ...] = ()


def test_second_model_from_the_same_config_is_untouched() -> None:
    model = build("deepseek_v2")
    with torch.no_grad():
        other = type(model)(model.config).eval()
    assert other.config is model.config
    before = outputs(other, prompt())
    moekern.patch(model)
    assert torch.equal(outputs(other, prompt()), before)
    assert other.config._attn_implementation == "sdpa"
    assert other.config._experts_implementation != "moekern"
    assert model.config is other.config


@pytest.mark.parametrize("name", ["deepseek_v2", "gpt_oss"])
def test_pickles_and_copies(name: str) -> None:
    model, ids = build(name), prompt()
    before = outputs(model, ids)
    moekern.patch(model)
    after = outputs(model, ids)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(outputs(other, ids), after)
        for parameter in other.parameters():
            nn.init.zeros_(parameter)  # a copy that still ran the original's modules would not notice
        assert not torch.equal(outputs(other, ids), after)
        moekern.unpatch(other)
        assert all("_moekern" not in module.__dict__ for module in other.modules())
    moekern.unpatch(model)
    assert torch.equal(outputs(model, ids), before)


def test_unpickles_in_a_process_that_imported_nothing(tmp_path: Any) -> None:
    model = build("mixtral")
    moekern.patch(model, router=False)
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys; model = pickle.load(open(sys.argv[1], 'rb')); "
        "import torch; print(torch.isfinite(model(torch.ones(1, 3, dtype=torch.long)).logits).all().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "True", done.stderr


def test_import_registers_lazily() -> None:
    code = (
        "import sys, moekern; assert 'transformers' not in sys.modules; "
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as experts; "
        "from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS as fp8; "
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as attention; "
        "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks; "
        "print('moekern' in experts, 'moekern' in fp8, 'moekern_mla' in attention, 'moekern_mla' in masks)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True True True True", done.stderr


def test_weights_replaced_after_patching_are_used() -> None:
    model, ids = build("deepseek_v2"), prompt()
    moekern.patch(model)
    before = outputs(model, ids)
    layer = model.model.layers[1]
    layer.mlp.experts.down_proj = nn.Parameter(layer.mlp.experts.down_proj * 2)
    layer.mlp.gate.weight = nn.Parameter(layer.mlp.gate.weight.flip(0))
    layer.self_attn.kv_b_proj.weight = nn.Parameter(layer.self_attn.kv_b_proj.weight * 0.5)
    after = outputs(model, ids)
    assert not torch.equal(after, before)
    moekern.unpatch(model)
    torch.testing.assert_close(outputs(model, ids), after, rtol=1e-4, atol=1e-4)


class _Lora(nn.Linear):
    """A low-rank adapter as PEFT builds them: `weight` alone is no longer what the layer computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


def test_adapter_on_the_up_projection_after_patching() -> None:
    model, ids = build("deepseek_v2"), prompt()
    moekern.patch(model)
    before = outputs(model, ids)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.__class__ = _Lora
    after = outputs(model, ids)
    assert (after - before).abs().max() > 0.1
    moekern.unpatch(model)
    torch.testing.assert_close(outputs(model, ids), after, rtol=1e-4, atol=1e-4)
    reasons = {entry.reason for entry in moekern.patch(model).skipped}
    assert reasons == {"kv_b_proj is a _Lora or has a bias or hooks"}


def test_meta_and_hooks_and_foreign_patches_are_skipped() -> None:
    model = build("deepseek_v2")
    layers = model.model.layers
    layers[0].mlp.experts.to("meta")
    layers[0].mlp.gate.forward = layers[0].mlp.gate.forward
    layers[0].self_attn.kv_b_proj.to("meta")
    layers[1].mlp.experts.down_proj.data = layers[1].mlp.experts.down_proj.data.to(torch.float8_e4m3fn)
    report = moekern.patch(model)
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert reasons == {
        "model.layers.0.mlp.experts": "gate_up_proj is on meta",
        "model.layers.0.mlp.gate": "its forward is replaced on the instance already",
        "model.layers.0.self_attn": "kv_b_proj.weight is on meta",
        "model.layers.1.mlp.experts": "down_proj is float8_e4m3fn",
    }
    assert len(report.patched) == 2


def test_accelerate_cpu_offload_is_skipped() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, ids = build("deepseek_v2"), prompt()
    before = outputs(model, ids)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    report = moekern.patch(model)
    assert not report.patched
    assert {entry.reason for entry in report.skipped if entry.kind == "experts"} == {
        "an accelerate hook moves its weights"
    }
    assert torch.equal(outputs(model, ids), before)


def test_activation_that_the_table_does_not_describe() -> None:
    model = build("gpt_oss")
    experts = model.model.layers[0].mlp.experts

    class Changed(type(experts)):  # type: ignore[misc]
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            return super()._apply_gate(gate_up) * 1.01

    experts.__class__ = Changed
    reasons = {entry.name: entry.reason for entry in moekern.patch(model).skipped}
    assert reasons == {
        "model.layers.0.mlp.experts": "its activation computes something else than the table says"
    }


def test_router_that_the_table_does_not_describe() -> None:
    model = build("deepseek_v3")
    gate = model.model.layers[1].mlp.gate

    class Changed(type(gate)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits, weights, ids = super().forward(hidden_states)
            return logits, weights * 1.01, ids

    gate.__class__ = Changed
    reasons = {entry.name: entry.reason for entry in moekern.patch(model).skipped}
    assert reasons == {"model.layers.1.mlp.gate": "its weights differ from what the table says"}


def test_device_without_kernel_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEKERN_BACKEND", raising=False)
    from moekern import ops
    from moekern._op import Backend
    from moekern.hf import _common

    reason, cuda = _common.reason_without_kernel, torch.device("cuda")
    spec = ops.SPECS["mla_decode"]
    narrow = Backend(spec.ref, lambda: None, lambda latent, **_: "too wide" if latent.shape[2] > 8 else None)
    absent = Backend(spec.ref, lambda: "no driver")
    for backends, given, expected in (
        ({}, {}, "no cuda kernel for mla_decode: there is none yet"),
        ({"triton": absent}, {}, "no cuda kernel for mla_decode: no driver"),
        ({"triton": narrow}, {}, None),
        ({"triton": narrow}, {"latent": torch.empty(1, 1, 8)}, None),
        ({"triton": narrow}, {"latent": torch.empty(1, 1, 9)}, "no cuda kernel for mla_decode: too wide"),
    ):
        monkeypatch.setitem(ops.SPECS, "mla_decode", dataclasses.replace(spec, backends=backends))
        assert reason("mla_decode", cuda, **given) == expected
        _common._has_kernel.cache_clear()
        assert _common.has_kernel("mla_decode", cuda) == (expected is None or bool(given))
        assert _common.has_kernel("mla_decode", torch.device("cpu"))
    monkeypatch.setenv("MOEKERN_BACKEND", "triton")
    assert reason("mla_decode", cuda, latent=torch.empty(1, 1, 9)) is None
    _common._has_kernel.cache_clear()


def test_no_patched_module_at_all_warns(caplog: pytest.LogCaptureFixture) -> None:
    model = build("mixtral").to("meta")
    with caplog.at_level("WARNING", "moekern"):
        report = moekern.patch(model)
    assert not report.patched
    assert "0 modules patched, 4 skipped" in caplog.text


def test_generate_after_patching_every_time() -> None:
    """Two patches in a row must not leave a config behind that generate would change."""
    model, ids = build("mixtral"), prompt()
    tokens = generate(model, ids)
    for _ in range(2):
        with moekern.patched(model):
            assert torch.equal(generate(model, ids), tokens)
        assert torch.equal(generate(model, ids), tokens)
