"""Fixtures of the patch layer's tests. They run on whatever backend is here, the reference where nothing is built."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from moekern import _op, ops


@pytest.fixture(autouse=True)
def _some_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ("fused_experts", "mla_decode", "mla_decompress", "gate_topk")
    if any(_op.backends_of(ops.SPECS[name])["cpu"] is not None for name in needed):
        monkeypatch.setenv("MOEKERN_BACKEND", "ref")
