"""patch, unpatch, patched: puts the kernels into a loaded model, and takes them out."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from moekern.hf import _common, experts, linear, mla, registry, router, routers
from moekern.hf.report import Entry, Report

logger = logging.getLogger(__name__)

_KINDS = (
    ("experts", experts.is_experts, experts.reason_against),
    ("router", routers.is_router, router.reason_against),
    ("mla", mla.is_mla, mla.reason_against),
    ("linear", linear.is_linear, linear.reason_against),
)

# The forward that a module gets, of the kinds that are patched by one.
_FORWARDS: dict[str, Callable[..., Any]] = {
    "router": router.router_forward,
    "linear": linear.linear_forward,
}


def patch(
    model: nn.Module, experts: bool = True, router: bool = True, mla: bool = True, linear: bool = True
) -> Report:
    """Makes a loaded transformers model run on moekern's kernels, in place.

    Args:
        model: a transformers model, or any module that contains one.
        experts: replace the expert layers.
        router: replace the routers.
        mla: replace latent attention.
        linear: replace the products of up to 16 rows (bf16; 2 in fp16) in large `nn.Linear` layers on the CPU. Only in
            a model that has modules of the other kinds, whether they are asked for or not; the `kv_b_proj` of latent
            attention is left out, as decoding does not call it.

    Returns:
        What was patched, and what was not and why. Patching again changes nothing and reports the same.

    Raises:
        ValueError: when the model has no module of the kinds asked for; a dense model has none, whatever its linear
            layers.
        ImportError: without transformers.

    Notes:
        Only instances change: no class, no module of transformers and no shared config. With MOEKERN_DISABLE=1 in the
        environment nothing changes.
    """
    report, _ = _apply(model, experts=experts, router=router, mla=mla, linear=linear)
    return report


def unpatch(model: nn.Module) -> None:
    """Puts back the very objects that `patch` replaced. Does nothing to a model that is not patched."""
    for module in model.modules():
        _restore(module)


@contextlib.contextmanager
def patched(
    model: nn.Module, experts: bool = True, router: bool = True, mla: bool = True, linear: bool = True
) -> Iterator[Report]:
    """Patches the model inside a `with` block; modules that were patched before stay patched after it."""
    report, changed = _apply(model, experts=experts, router=router, mla=mla, linear=linear)
    try:
        yield report
    finally:
        for module in changed:
            _restore(module)


def _apply(model: nn.Module, **wanted: bool) -> tuple[Report, list[nn.Module]]:
    registry.ensure()
    disabled = os.environ.get("MOEKERN_DISABLE", "0") not in ("", "0")
    configs: dict[tuple[int, str], Any] = {}
    entries, changed = [], []
    ours = [module for module in model.modules() if any(matches(module) for _, matches, _ in _KINDS[:-1])]
    wanted["linear"] = wanted["linear"] and bool(ours)
    unused = {module.kv_b_proj for module in ours if mla.is_mla(module)}
    for name, module in model.named_modules():
        if module in unused:
            continue
        for kind, matches, reason_against in _KINDS:
            if not wanted[kind] or not matches(module):
                continue
            reason = "MOEKERN_DISABLE is set" if disabled else None
            if reason is None and _common.saved_of(module) is None:
                reason = reason_against(module)
                if reason is None:
                    _replace(module, kind, configs)
                    changed.append(module)
            entries.append(Entry(name, kind, type(module).__name__, reason))
            break
    if not entries:
        kinds = ", ".join(kind for kind in wanted if wanted[kind]) or "nothing"
        raise ValueError(f"patch: {type(model).__name__} has nothing to patch; looked for: {kinds}")
    report = Report(tuple(entries))
    if not report.patched and not disabled:
        logger.warning("%s", report)
    return report, changed


def _replace(module: nn.Module, kind: str, configs: dict[tuple[int, str], Any]) -> None:
    if kind in _FORWARDS:
        # A partial of a module-level function, not a closure: it pickles, and copies with the module.
        saved = _common.Saved(kind, {}, added=("forward",))
        module.__dict__["forward"] = functools.partial(_FORWARDS[kind], module)
    else:
        original = module.__dict__["config"]
        added = ("expand_kv",) if kind == "mla" else ()
        saved = _common.Saved(kind, {"config": original}, added=added)
        if (id(original), kind) not in configs:
            configs[id(original), kind] = _copied_config(original, kind)
        module.__dict__["config"] = configs[id(original), kind]
        if kind == "mla":
            module.__dict__["expand_kv"] = mla.pass_through
    module.__dict__[_common.STATE] = saved


def _copied_config(config: Any, kind: str) -> Any:
    """A copy that selects our implementation: setting it on the original redirects every model that shares it."""
    copied = copy.deepcopy(config)
    if kind == "mla":
        copied._attn_implementation = registry.MLA_NAME
    else:
        copied._experts_implementation = registry.EXPERTS_NAME
    return copied


def _restore(module: nn.Module) -> None:
    saved = module.__dict__.pop(_common.STATE, None)
    if saved is not None:
        module.__dict__.update(saved.replaced)
        for name in saved.added:
            del module.__dict__[name]
