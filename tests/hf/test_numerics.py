"""The error of a patched model against fp64, by the yardstick: at most 1.25 times that of the unpatched model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf.families import FAMILIES, build, cast, outputs, prompt

import moekern

# One family of each kind of router, activation and attention.
NAMES = ("bailing_hybrid", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v4", "ernie4_5_moe", "glm4_moe_lite",
         "gpt_oss", "granitemoe", "lfm2_moe", "longcat_flash", "minicpm3", "minimax_m3_vl", "mistral4", "mixtral",
         "nemotron_h", "qwen3_moe", "youtu")  # fmt: skip


def _exact(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """fp64 logits of a model in a narrower dtype (transformers' grouped_mm takes no fp64, its eager experts do)."""
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    return outputs(exact, ids)


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """RMS error over the nine tenths of the tokens that it is smallest for.

    A token whose rounded scores nearly tie may go to another expert in either model; one such token outweighs the
    rounding of a hundred others, and which model it strikes is chance.
    """
    squares = (found.double() - exact).square().mean(-1).flatten().sort().values
    return squares[: squares.numel() * 9 // 10].mean().sqrt().item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_of_the_logits(name: str, dtype: torch.dtype) -> None:
    model = cast(build(name), dtype)
    ids = prompt(4, 48)
    exact = _exact(model, ids)
    before = outputs(model, ids)
    moekern.patch(model)
    after = outputs(model, ids)
    assert after.dtype == before.dtype
    assert 0 < _error(after, exact) <= 1.25 * _error(before, exact)


@pytest.mark.parametrize("name", ["deepseek_v2", "qwen3_moe", "gpt_oss"])
def test_error_under_autocast(name: str) -> None:
    model, ids = build(name), prompt(4, 24)
    exact = _exact(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        before = outputs(model, ids)
        moekern.patch(model)
        after = outputs(model, ids)
    assert after.dtype == before.dtype
    assert _error(after, exact) <= 1.25 * _error(before, exact)


def test_names_are_families() -> None:
    assert set(NAMES) <= set(FAMILIES)
