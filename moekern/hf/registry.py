"""Registers moekern's names with transformers, once transformers' registries exist.

Importing them here would cost 1.4 s to someone who only wants the ops, so registration waits until transformers imports
them itself, which every `from_pretrained` does.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

EXPERTS_NAME = "moekern"
# Without "flash" in it: transformers takes such a name for a FlashAttention version and checks for the package.
MLA_NAME = "moekern_mla"


def _register(module: Any, interface: str, name: str, function: Any) -> None:
    # This runs inside an import of transformers: a release without the interface must not make that import fail.
    if hasattr(module, interface):
        getattr(module, interface).register(name, function)


def _register_experts(module: Any) -> None:
    from moekern.hf.experts import experts_forward

    _register(module, "ExpertsInterface", EXPERTS_NAME, experts_forward)


def _register_fp8_experts(module: Any) -> None:
    from moekern.hf.experts import fp8_experts_forward

    _register(module, "FP8ExpertsInterface", EXPERTS_NAME, fp8_experts_forward)


def _register_attention(module: Any) -> None:
    from moekern.hf.mla import mla_attention_forward

    _register(module, "AttentionInterface", MLA_NAME, mla_attention_forward)


def _register_mask(module: Any) -> None:
    # An attention name without a mask function gets no mask at all, silently.
    _register(module, "AttentionMaskInterface", MLA_NAME, getattr(module, "sdpa_mask", None))


REGISTRIES: dict[str, Callable[[Any], None]] = {
    "transformers.integrations.moe": _register_experts,
    "transformers.integrations.finegrained_fp8": _register_fp8_experts,
    "transformers.modeling_utils": _register_attention,
    "transformers.masking_utils": _register_mask,
}


class _RegisteringLoader(Loader):
    """Runs a module's own loader, then the registration that waited for it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module sees its own loader again: inspect and pickle look at it.
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        REGISTRIES[module.__name__](module)


class _Finder(MetaPathFinder):
    """Hands the modules of REGISTRIES to `_RegisteringLoader`; knows nothing of any other module."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in REGISTRIES:
            return None
        for finder in sys.meta_path:
            spec = (
                None
                if finder is self or not hasattr(finder, "find_spec")
                else finder.find_spec(fullname, path)
            )
            if spec is not None and spec.loader is not None:
                spec.loader = _RegisteringLoader(spec.loader)
                return spec
        return None


def install() -> None:
    """Registers with what transformers has loaded already and arranges for the rest. Cheap, and does nothing twice."""
    if any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name, register in REGISTRIES.items():
        if name in sys.modules:
            register(sys.modules[name])


def ensure() -> None:
    """Imports transformers' registries, which registers the names. Raises ImportError without transformers."""
    for name in REGISTRIES:
        importlib.import_module(name)
