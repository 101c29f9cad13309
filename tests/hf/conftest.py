"""Fixtures of the patch layer's tests. They run on whatever backend is here, the reference where nothing is built."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers")

from moekern import _op, ops


@pytest.fixture(autouse=True)
def _some_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ("fused_experts", "mla_decode", "mla_decompress", "gate_topk")
    if any(_op.backends_of(ops.SPECS[name])["cpu"] is not None for name in needed):
        monkeypatch.setenv("MOEKERN_BACKEND", "ref")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models run several times faster on one thread, above all on a machine that others use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
