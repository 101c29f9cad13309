"""moekern against transformers' own backends on a CPU, in one run.

DeepSeek-V2-Lite's layer shapes, random data, bfloat16. Every contender does the same work on the same weights, in turns,
and each row's ratio is to the fastest of transformers' own backends in that row, whichever it defaults to. Weights and caches rotate over more
than the last-level cache between two uses, as they do in a model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moekern
from bench.timing import Contender, interleave
from moekern import ops, random_models

BUSY = 0.5  # load average from which on something else is running
EXPERTS = ("grouped_mm", "batched_mm", "eager")  # transformers' default first
ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class Row:
    """One line of the table. floor and aim: the ratio to reach, at least and at best."""

    name: str
    floor: float
    aim: float
    contenders: Callable[[], dict[str, Contender]]
    min_rounds: int = 7
    warm_up: bool = True


@dataclass(frozen=True)
class Shapes:
    """What is measured: the published shapes, or a smoke test of the code."""

    tiny: bool = False
    cached: tuple[int, ...] = (4096, 1024, 128)
    prefill: int = 4096
    tokens: tuple[int, ...] = (1, 64, 512)
    attention_cached: int = 4096
    # 64 layers' latents and W_UK, W_UV are 570 MB, more than the 480 MB last-level cache of a current server part.
    attention_copies: int = 64
    budget_s: float = 12.0


QUICK = Shapes(True, (32, 16, 8), 48, (1, 4, 16), 32, 2, 0.05)
# The ratios that a release has to reach with AVX512-BF16: (at least, aim), in the order of Shapes.
CACHED_GOALS = ((5.0, 7.0), (1.6, 2.2), (1.1, 1.3))
TOKENS_GOALS = ((1.4, 1.8), (1.4, 2.0), (1.1, 1.4))


class Lab:
    """The model, twins of it that share its weights, and the rows that are measured with them."""

    def __init__(self, shapes: Shapes, progress: Callable[[int], Any] | None = None) -> None:
        self.shapes = shapes
        self.generator = torch.Generator().manual_seed(0)
        longest = max(*shapes.cached, shapes.prefill, shapes.attention_cached) + 8
        self.config = random_models.make_config("deepseek_v2", 3, longest, tiny=shapes.tiny)
        self.model = random_models.build_model(self.config, torch.bfloat16, progress=progress)
        self.twins: dict[tuple[str, str], Any] = {}
        self.patched = random_models.share_weights(self.model)
        moekern.patch(self.patched)

    def twin(self, attention: str, experts: str) -> Any:
        """The model with one of transformers' attention and experts backends."""
        key = (attention, experts)
        if key not in self.twins:
            self.twins[key] = random_models.share_weights(self.model)
            self.twins[key].set_attn_implementation(attention)
            self.twins[key].set_experts_implementation(experts)
        return self.twins[key]

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).bfloat16()

    def rows(self) -> Iterator[Row]:
        s = self.shapes
        for length, goals in zip(s.cached, CACHED_GOALS, strict=True):
            yield Row(f"decode, 3-layer model, {length} cached", *goals, lambda n=length: self.decode(n))  # type: ignore[misc]
        yield Row(
            f"prefill of {s.prefill}, 3-layer model", 1.8, 2.3, self.prefill, min_rounds=3, warm_up=False
        )
        for tokens, goals in zip(s.tokens, TOKENS_GOALS, strict=True):
            name = f"fused_experts, {tokens} token{'s' * (tokens > 1)}"
            yield Row(name, *goals, lambda n=tokens: self.experts(n))  # type: ignore[misc]
        name = f"mla_decode, {self.config.num_attention_heads} heads, {s.attention_cached} cached"
        yield Row(name, 25.0, 80.0, self.attention)

    def decode(self, length: int) -> dict[str, Contender]:
        """One more token after `length` cached ones: a whole forward of the model."""
        from transformers import DynamicCache

        c = self.config
        filled = [
            (self.randn(1, 1, length, c.kv_lora_rank), self.randn(1, 1, length, c.qk_rope_head_dim))
            for _ in range(c.num_hidden_layers)
        ]
        tokens = torch.randint(c.vocab_size, (1024, 1, 1), generator=self.generator)

        def contender(model: Any, group: str) -> Contender:
            cache = DynamicCache(config=c)
            for layer, (latent, rope) in enumerate(filled):
                cache.update(latent, rope, layer)

            def before(_: int) -> None:
                for layer, (latent, rope) in zip(cache.layers, filled, strict=True):
                    layer.keys, layer.values = latent, rope

            def run(i: int) -> Any:
                with torch.no_grad():
                    return model(input_ids=tokens[i % 1024], past_key_values=cache, use_cache=True).logits

            return Contender(run, before, group)

        found = {
            f"{attention} + {experts}": contender(self.twin(attention, experts), "transformers")
            for attention in ATTENTION
            for experts in EXPERTS
        }
        return {**found, "moekern": contender(self.patched, "moekern")}

    def prefill(self) -> dict[str, Contender]:
        """A prompt into an empty cache, and the logits of its last token."""
        tokens = torch.randint(self.config.vocab_size, (16, 1, self.shapes.prefill), generator=self.generator)

        def contender(model: Any, group: str) -> Contender:
            def run(i: int) -> Any:
                with torch.no_grad():
                    return model(input_ids=tokens[i % 16], use_cache=True, logits_to_keep=1).logits

            with torch.no_grad():  # lazy set-up; a whole prompt would cost 20 s for each contender
                model(input_ids=tokens[0, :, : min(64, self.shapes.prefill)], logits_to_keep=1)
            return Contender(run, group=group)

        # batched_mm gathers a copy of the expert for every pair of token and expert: 425 GB at 4096 tokens.
        found = {
            f"{attention} + {experts}": contender(self.twin(attention, experts), "transformers")
            for attention in ATTENTION
            for experts in ("grouped_mm", "eager")
        }
        return {**found, "moekern": contender(self.patched, "moekern")}

    def experts(self, num_tokens: int) -> dict[str, Contender]:
        """The routed experts of one layer, routing given. The model's two expert layers take turns, and at one token
        no expert comes again before every expert of its layer was used."""
        c = self.config
        layers = range(c.first_k_dense_replace, c.num_hidden_layers)
        E, K, count = c.n_routed_experts, c.num_experts_per_tok, 64
        x = self.randn(count, num_tokens, c.hidden_size)
        order = torch.rand(count * num_tokens, E, generator=self.generator).argsort(-1)
        if num_tokens == 1:
            deck = torch.cat(
                [torch.randperm(E, generator=self.generator) for _ in range(math.ceil(count * K / E))]
            )
            ids = deck[: count * K].view(count, 1, K)
            # A call at the seam of two shuffles could name an expert twice; routers never do.
            repeated = torch.tensor([len(set(row)) < K for row in ids[:, 0].tolist()])
            ids[repeated, 0] = order[repeated, :K]
        else:
            ids = order[:, :K].reshape(count, num_tokens, K).contiguous()
        weights = torch.rand(count, num_tokens, K, generator=self.generator).softmax(-1)

        def module(model: Any, i: int) -> Any:
            return model.model.layers[layers[i % len(layers)]].mlp.experts

        def theirs(experts: str) -> Contender:
            model = self.twin("sdpa", experts)

            def run(i: int) -> Tensor:
                j = i // len(layers) % count
                with torch.no_grad():
                    return module(model, i)(x[j], ids[j], weights[j])

            return Contender(run)

        def ours(i: int) -> Any:
            j, m = i // len(layers) % count, module(self.model, i)
            with torch.no_grad():
                return ops.fused_experts(x[j], m.gate_up_proj, m.down_proj, weights[j], ids[j])

        # batched_mm copies 17 MB of weights per pair: 6.6 GB at 64 tokens, to read what is 1.1 GB in place.
        names = [n for n in EXPERTS if n != "batched_mm" or num_tokens <= 8]
        return {**{name: theirs(name) for name in names}, "moekern": Contender(ours, group="moekern")}

    def attention(self) -> dict[str, Contender]:
        """One query over the cached latents, W_UK and W_UV included; against `expand_kv` and attention over K and V."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.deepseek_v2 import modeling_deepseek_v2

        c, length, count = self.config, self.shapes.attention_cached, self.shapes.attention_copies
        H, width = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
        latent = self.randn(count, 1, length, c.kv_lora_rank)
        rope = self.randn(count, 1, length, c.qk_rope_head_dim)
        weight = self.randn(count, H * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
        weight *= 1.5 / c.kv_lora_rank**0.5
        q = self.randn(count, 1, 1, H, width)

        def theirs(name: str) -> Contender:
            module = self.twin(name, "grouped_mm").model.layers[0].self_attn
            kept = module.kv_b_proj.weight
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, modeling_deepseek_v2.eager_attention_forward)

            def run(i: int) -> Tensor:
                j = i % count
                module.kv_b_proj.weight = torch.nn.Parameter(weight[j], requires_grad=False)
                with torch.no_grad():
                    k, v = module.expand_kv(latent[j, None], rope[j, None])
                    out = attend(
                        module, q[j].transpose(1, 2), k, v, None, scaling=module.scaling, dropout=0.0
                    )[0]
                module.kv_b_proj.weight = kept
                return out

            return Contender(run)

        scale = self.model.model.layers[0].self_attn.scaling

        def ours(i: int) -> Any:
            j = i % count
            with torch.no_grad():
                return ops.mla_decode(q[j], latent[j], rope[j], weight[j], scale=scale)

        return {**{name: theirs(name) for name in ATTENTION}, "moekern": Contender(ours, group="moekern")}


def measure(row: Row, budget_s: float, progress: Callable[[str], Any]) -> dict[str, Any]:
    """One row of the table, as plain data."""
    timings = interleave(
        row.contenders(),
        budget_s=budget_s,
        min_rounds=row.min_rounds,
        warm_up=row.warm_up,
        progress=progress,
    )
    # The first one is what transformers uses when it is not told otherwise.
    default = next(iter(timings))
    best = min((n for n in timings if n != "moekern"), key=lambda n: timings[n].median)
    return {
        "case": row.name,
        "ratio": timings[best].median / timings["moekern"].median,
        "ratio_to_default": timings[default].median / timings["moekern"].median,
        "at_least": row.floor,
        "aim": row.aim,
        "best": best,
        "default": default,
        "contenders": {name: timing.summary() for name, timing in timings.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    cells = [
        ("case", "moekern", "their best", "ratio", "at least", "aim", "to default", "their best backend")
    ]
    for row in rows:
        theirs, ours = row["contenders"][row["best"]], row["contenders"]["moekern"]
        cells.append(
            (row["case"], f"{ours['median_ms']:.4g} ms", f"{theirs['median_ms']:.4g} ms", f"{row['ratio']:.2f}x",
             f"{row['at_least']:g}x", f"{row['aim']:g}x", f"{row['ratio_to_default']:.2f}x", row["best"])
        )  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(8)]
    lines = [
        f"{line[0]:<{widths[0]}}  "
        + "  ".join(f"{line[i]:>{widths[i]}}" for i in range(1, 7))
        + f"  {line[7]}"
        for line in cells
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to FILE")
    parser.add_argument("--only", metavar="TEXT", help="only the rows whose name contains TEXT")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: tries the code, measures nothing")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: its own choice)")
    parser.add_argument(
        "--check", action="store_true", help="exit status 1 when a row is below its least ratio"
    )


def save(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    shapes = QUICK if options.quick else Shapes()
    load = os.getloadavg()[0]
    with tqdm(desc="random weights", leave=False, disable=None, unit="", unit_scale=True) as bar:
        lab = Lab(shapes, bar.update)
    chosen = [row for row in lab.rows() if options.only is None or options.only in row.name]
    if not chosen:
        raise ValueError(f"no row's name contains {options.only!r}")
    environment = moekern.info()
    rows: list[dict[str, Any]] = []
    with tqdm(chosen, leave=False, disable=None, unit="row") as bar:
        for row in bar:
            bar.set_description(row.name)
            rows.append(measure(row, shapes.budget_s, lambda name: bar.set_postfix_str(name)))
            if options.json is not None:  # after each row: an interrupted run keeps what it has
                save(options.json, {
                    "quick": options.quick, "threads": torch.get_num_threads(), "load": load, "rows": rows,
                    "environment": environment,
                })  # fmt: skip
    machine = environment["machine"]
    usable = [name for name, has in (machine["features"] or {}).items() if has]
    print(f"{machine['processor']}, {torch.get_num_threads()} threads, kernels run with {machine['isa']}")
    print(f"features: {', '.join(usable) or 'unknown'}")
    print(f"torch {torch.__version__}, transformers {environment['versions']['transformers']}, bfloat16\n")
    if load > BUSY:
        print(f"load average {load:.1f} at the start: other processes disturb these numbers\n")
    print(table(rows))
    below = [row["case"] for row in rows if row["ratio"] < row["at_least"]]
    if below:
        print(f"\nbelow the least ratio: {'; '.join(below)}")
    return 1 if options.check and below else 0
