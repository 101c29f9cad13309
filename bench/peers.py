"""What an op is compared with: other implementations of the same work, each behind one small adapter.

A peer takes the arguments of moekern's op by keyword. A new one is one entry in PEERS.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moekern import random_models
from moekern.ops import SPECS

Call = Callable[[Mapping[str, Any]], Any]
Wrap = Callable[[Any], Any]  # of a function or module: torch.compile, or nothing


def _always() -> None:
    return None


def _any(_: Mapping[str, Any]) -> None:
    return None


@dataclass(frozen=True)
class Peer:
    """make(wrap) returns the function of the op's arguments that is timed; wrap goes around what is computed.

    unavailable: why it cannot run on this machine, or None. supports: why it cannot take these arguments, or None.
    compiles: it is timed under torch.compile too (`name`, compiled), where the case asks for it. Whether it can be captured in
    a CUDA graph is found out; capturable=False saves the attempt where it is known not to be.
    """

    op: str
    name: str
    make: Callable[[Wrap], Call]
    unavailable: Callable[[], str | None] = _always
    supports: Callable[[Mapping[str, Any]], str | None] = _any
    compiles: bool = False
    capturable: bool = True


# Expert layers


def _plain_experts(arguments: Mapping[str, Any]) -> str | None:
    """Peers know gated SiLU experts, gate first, [E, 2F, D] and [E, D, F], no bias."""
    options = {"activation": "silu", "gated": True, "interleaved": False, "transposed": False, "limit": None,
               "alpha": 1.0, "up_shift": 0.0, "reduce": True, "b_gate_up": None, "b_down": None}  # fmt: skip
    unlike = [n for n, v in options.items() if arguments.get(n, v) != v]
    return f"not with {', '.join(unlike)}" if unlike else None


def experts_module(w_gate_up: Tensor, w_down: Tensor, implementation: str) -> Any:
    """transformers' own experts module (DeepSeek-V2's) around these weights."""
    num_experts, d, f = w_down.shape
    config = random_models.make_config(
        "deepseek_v2", 2, 64, tiny=True, hidden_size=d, moe_intermediate_size=f, n_routed_experts=num_experts
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        model = random_models.empty_model(config, w_down.dtype)
    module = model.model.layers[-1].mlp.experts
    module.gate_up_proj = torch.nn.Parameter(w_gate_up, requires_grad=False)
    module.down_proj = torch.nn.Parameter(w_down, requires_grad=False)
    module.config = config
    return module


def _transformers(implementation: str, wrap: Wrap) -> Call:
    """A module per set of weights: the sets of a case may have weights of their own."""
    modules: dict[int, Any] = {}

    def call(arguments: Mapping[str, Any]) -> Tensor:
        key = arguments["w_gate_up"].data_ptr()
        if key not in modules:
            module = experts_module(arguments["w_gate_up"], arguments["w_down"], implementation)
            modules[key] = wrap(module)
        # Routers hand over weights in the model's dtype or fp32; DeepSeek's in fp32.
        return modules[key](arguments["x"], arguments["ids"], arguments["weights"])

    return call


def _no_transformers() -> str | None:
    return None if importlib.util.find_spec("transformers") else "transformers is not installed"


def _few_pairs(arguments: Mapping[str, Any]) -> str | None:
    """batched_mm copies an expert's matrices for every pair."""
    copied = (
        arguments["ids"].numel() * (arguments["w_gate_up"][0].numel() + arguments["w_down"][0].numel()) * 2
    )
    if copied > 16 << 30:
        return f"would copy {copied / 2**30:.0f} GiB of weights"
    return _plain_experts(arguments)


def _grouped_mm() -> Callable[..., Tensor] | None:
    return getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def _no_grouped_mm() -> str | None:
    return None if _grouped_mm() is not None else f"torch {torch.__version__} has no grouped_mm"


def torch_experts(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The whole layer with torch's grouped GEMM: sort, gather, two GEMMs, weighted sum in fp32. Below compute capability 9.0
    torch loops over the experts on the host."""
    grouped_mm = _grouped_mm()
    assert grouped_mm is not None
    num_tokens, top_k = ids.shape
    ordered, order = ids.flatten().sort()
    ends = torch.arange(1, w_down.shape[0] + 1, device=ids.device)
    offsets = torch.searchsorted(ordered, ends).to(torch.int32)
    z = grouped_mm(x[order // top_k], w_gate_up.transpose(1, 2), offs=offsets)
    gate, up = z.chunk(2, dim=-1)
    y = grouped_mm(functional.silu(gate) * up, w_down.transpose(1, 2), offs=offsets)
    rows = torch.empty_like(y).index_copy_(0, order, y).view(num_tokens, top_k, -1)
    return (rows.float() * weights[..., None]).sum(1).to(x.dtype)


def _only(function: Callable[..., Any], names: tuple[str, ...], wrap: Wrap) -> Call:
    function = wrap(function)

    def call(arguments: Mapping[str, Any]) -> Any:
        return function(*(arguments[n] for n in names))

    return call


def _no_liger() -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    try:
        from liger_kernel.ops import LigerFusedMoEFunction  # noqa: F401
    except ImportError as error:
        return f"liger-kernel has no fused experts: {error}"
    return None


def _liger(_: Wrap) -> Call:
    from liger_kernel.ops import LigerFusedMoEFunction

    def call(arguments: Mapping[str, Any]) -> Any:
        ids = arguments["ids"].to(torch.int32)
        return LigerFusedMoEFunction.apply(
            arguments["x"], arguments["w_gate_up"], arguments["w_down"], ids, arguments["weights"]
        )

    return call


# Attention and gating


def sdpa_after_decompression(
    q: Tensor, latent: Tensor, k_rope: Tensor, w_kv_b: Tensor, scale: float, pad: bool = False
) -> Tensor:
    """What transformers does: K and V of all heads from the cache (its `expand_kv`), then SDPA. [B, 1, H, V]. pad: V as wide
    as K, which torch's flash attention asks for."""
    num_heads, width = q.shape[2:]
    nope = width - k_rope.shape[-1]
    kv = functional.linear(latent, w_kv_b).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    shared = k_rope[:, None].expand(-1, num_heads, -1, -1)
    k = torch.cat((kv[..., :nope], shared), dim=-1)
    v = kv[..., nope:]
    value_dim = v.shape[-1]
    if pad:
        v = functional.pad(v, (0, width - value_dim))
    out = functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=scale)
    return out[..., :value_dim].transpose(1, 2)


def sdpa_padded(q: Tensor, latent: Tensor, k_rope: Tensor, w_kv_b: Tensor, scale: float) -> Tensor:
    return sdpa_after_decompression(q, latent, k_rope, w_kv_b, scale, pad=True)


def _one_query(arguments: Mapping[str, Any]) -> str | None:
    if arguments["q"].shape[1] != 1:
        return "one query token only"
    unlike = [n for n in ("lengths", "mask", "block_table") if arguments.get(n) is not None]
    return f"not with {', '.join(unlike)}" if unlike else None


def torch_gate(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The router of Qwen3-MoE as transformers writes it, after its linear layer."""
    weights = functional.softmax(logits, dtype=torch.float, dim=-1)
    weights, ids = torch.topk(weights, top_k, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype), ids


def torch_router(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return torch_gate(functional.linear(x, weight), top_k)


def torch_route(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The sort and offsets of transformers' grouped_mm backend."""
    ordered, perm = torch.sort(ids.flatten())
    counted = (
        ordered.int() if ids.device.type == "cuda" else ordered.float()
    )  # histc takes either there, not both
    counts = torch.histc(counted, bins=num_experts, min=0, max=num_experts - 1)
    return perm, torch.cumsum(counts, dim=0, dtype=torch.int32)


def torch_combine(y: Tensor, weights: Tensor) -> Tensor:
    """The end of transformers' grouped_mm backend."""
    return (y * weights.flatten()[:, None]).view(*weights.shape, -1).sum(dim=1).to(y.dtype)


def _model(op: str, wrap: Wrap) -> Call:
    """What transformers computes, from the op's SPEC."""
    spec = SPECS[op]
    assert spec.model is not None
    model = wrap(spec.model)
    return lambda arguments: model(**spec.bind((), arguments))


def _entries() -> Iterator[Peer]:
    experts = functools.partial(Peer, "fused_experts")
    for name, supports, graph in (
        ("grouped_mm", _plain_experts, True), ("batched_mm", _few_pairs, True), ("eager", _plain_experts, False),
    ):  # fmt: skip
        yield experts(
            f"transformers {name}", functools.partial(_transformers, name), _no_transformers, supports,
            compiles=graph, capturable=graph,
        )  # fmt: skip
    make_torch = functools.partial(_only, torch_experts, ("x", "w_gate_up", "w_down", "weights", "ids"))
    yield experts("torch grouped_mm", make_torch, _no_grouped_mm, _plain_experts, compiles=True)
    yield experts("liger-kernel", _liger, _no_liger, _plain_experts)
    for name, attention in (
        ("SDPA after decompression", sdpa_after_decompression),
        ("SDPA after decompression, V padded", sdpa_padded),
    ):
        make_attention = functools.partial(_only, attention, ("q", "latent", "k_rope", "w_kv_b", "scale"))
        yield Peer("mla_decode", name, make_attention, supports=_one_query, compiles=True)
    for op, name, function, names in (
        ("gate_topk", "torch", torch_gate, ("logits", "top_k")),
        ("gate", "torch", torch_router, ("x", "weight", "top_k")),
        ("route", "torch", torch_route, ("ids", "num_experts")),
        ("combine", "torch", torch_combine, ("y", "weights")),
    ):  # fmt: skip
        yield Peer(op, name, functools.partial(_only, function, names), compiles=True)
    for op in ("mla_decompress", "mla_cache_write"):
        yield Peer(op, "transformers", functools.partial(_model, op), compiles=True)


PEERS: tuple[Peer, ...] = tuple(_entries())


def _as_is(function: Any) -> Any:
    return function


def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=False)


def of(op: str, arguments: Mapping[str, Any], with_compiled: bool) -> Iterator[tuple[str, Call | str, bool]]:
    """(name, what is timed or why it is not, whether a CUDA graph may be tried) of every peer of an op."""
    for peer in PEERS:
        if peer.op != op:
            continue
        reason = peer.unavailable() or peer.supports(arguments)
        if reason is not None:
            yield peer.name, reason, False
            continue
        yield peer.name, peer.make(_as_is), peer.capturable
        if with_compiled and peer.compiles:
            yield f"{peer.name}, compiled", peer.make(_compiled), peer.capturable
