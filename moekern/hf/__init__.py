"""The patch layer: moekern's kernels inside a loaded transformers model. Importing it does not import transformers."""

from __future__ import annotations

from moekern.hf import registry
from moekern.hf.patch import patch, patched, unpatch
from moekern.hf.report import Entry, Report

registry.install()

__all__ = ["Entry", "Report", "patch", "patched", "unpatch"]
