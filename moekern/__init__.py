"""moekern: kernels for Mixture-of-Experts and Multi-head-Latent-Attention models."""

from __future__ import annotations

from moekern import hf, ops
from moekern.hf import patch, patched, unpatch
from moekern.ops import backends

__version__ = "0.1.0"

__all__ = ["__version__", "backends", "hf", "ops", "patch", "patched", "unpatch"]
