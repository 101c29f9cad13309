"""moekern: kernels for Mixture-of-Experts and Multi-head-Latent-Attention models."""

from __future__ import annotations

from typing import Any

from moekern import hf, ops
from moekern.hf import patch, patched, unpatch
from moekern.ops import backends

__version__ = "0.1.0"


def info() -> dict[str, Any]:
    """Versions, what was built, backends with reasons, CPU features, memory and GPUs, as plain data."""
    from moekern import _info

    return _info.collect()


__all__ = ["__version__", "backends", "hf", "info", "ops", "patch", "patched", "unpatch"]
