"""`python -m bench e2e`: one decode step of a whole model, DeepSeek-V2-Lite's 27 layers with random bf16 weights, patched
against transformers' own expert backends, eagerly with a dynamic cache and compiled with a static one.

All contenders share the weights and the cached latents and are timed in turns. Rows go into OUT/gpu.json, as the kernels' do.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moekern
from bench import gpu_bench, gpu_timing, ledger, machine
from bench.gpu_cases import CASES, GpuCase
from moekern import random_models

LAYERS = 27
EXPERTS = (
    "grouped_mm",
    "batched_mm",
)  # transformers' default, and what its `generate` switches to for decoding
MARGIN = 64  # cache positions behind the cached ones: warm-up steps go there
ROW_S = 10.0
# Of the logits against transformers', relative to their RMS: two unrelated sets of logits differ by 1.4. 27 layers with
# random weights amplify bf16 rounding, so this finds a broken patch and no more.
LIMIT = 0.7


@dataclass(frozen=True)
class Size:
    """What is built. backend: torch.compile's."""

    layers: int = LAYERS
    tiny: bool = False
    lengths: tuple[int, ...] = (512, 4096, 16384)
    batches: tuple[int, ...] = (1, 16)
    device: str = "cuda"
    backend: str = "inductor"


# Tries the code on a CPU in seconds; its numbers mean nothing.
TINY = Size(2, True, (8, 24), (1, 3), "cpu", "eager")


def fill(model: Any, device: torch.device, progress: Callable[[int], Any]) -> None:
    """Weights of scale 1.5/sqrt(fan_in), drawn on the device: a CPU would take minutes for 16 billion."""
    generator = torch.Generator(device).manual_seed(0)
    for name, value in model.named_parameters():
        if value.dim() > 1:
            value.normal_(0.0, 1.5 / value.shape[-1] ** 0.5, generator=generator)
        else:
            value.fill_(0.0 if name.endswith("bias") else 1.0)
        progress(value.numel())


def twin_of(model: Any) -> Any:
    """A second model over the same weights, which are not allocated twice."""
    with torch.device("meta"):
        twin = random_models.share_weights(model)
    for name, module in model.named_modules():
        other = twin.get_submodule(name)
        for key, value in vars(module).items():
            if isinstance(value, Tensor):  # neither parameter nor buffer
                setattr(other, key, value)
    return twin


class Lab:
    """The contenders: the model under transformers' expert backends, and patched."""

    def __init__(self, size: Size, progress: Callable[[int], Any] = lambda count: None) -> None:
        self.size, self.device = size, torch.device(size.device)
        longest = max(size.lengths) + MARGIN
        self.config = random_models.make_config("deepseek_v2", size.layers, longest, tiny=size.tiny)
        with self.device:
            model = random_models.empty_model(self.config, torch.bfloat16)
        with torch.no_grad():
            fill(model, self.device, progress)
        self.models = {f"transformers {EXPERTS[0]}": model}
        model.set_experts_implementation(EXPERTS[0])
        for name in EXPERTS[1:]:
            self.models[f"transformers {name}"] = twin_of(model)
            self.models[f"transformers {name}"].set_experts_implementation(name)
        self.models["moekern"] = twin_of(model)
        self.report = moekern.patch(self.models["moekern"])
        self.generator = torch.Generator(self.device).manual_seed(1)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.bfloat16)

    def cached(self, batch: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Latents and rotary keys of every layer."""
        c = self.config
        return [
            (self.randn(batch, 1, length, c.kv_lora_rank), self.randn(batch, 1, length, c.qk_rope_head_dim))
            for _ in range(c.num_hidden_layers)
        ]

    def cases(self) -> list[GpuCase]:
        """The table's, where this is its model."""
        if not self.size.tiny:
            return [c for c in CASES if c.method == "model"]
        return [
            GpuCase("model", f"tiny, batch {b}, {n} cached, {mode}", {"batch": b, "length": n, "mode": mode}, method="model")
            for mode in ("eager", "compiled") for b in self.size.batches for n in self.size.lengths
        ]  # fmt: skip

    def work(self, batch: int, length: int) -> tuple[float, float]:
        """FLOPs and least bytes of a step. Bytes: every weight that is used, of the experts those that a uniform router is
        expected to name, and the cached latents."""
        c = self.config
        model = next(iter(self.models.values()))
        experts = {n: p.numel() for n, p in model.named_parameters() if ".experts." in n}
        embedding = model.get_input_embeddings().weight.numel()
        dense = sum(p.numel() for p in model.parameters()) - sum(experts.values()) - embedding
        share = c.num_experts_per_tok / c.n_routed_experts
        latents = batch * length * (c.kv_lora_rank + c.qk_rope_head_dim) * c.num_hidden_layers
        read = dense + sum(experts.values()) * (1 - (1 - share) ** batch) + latents
        attention = c.num_attention_heads * latents * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
        attention /= c.kv_lora_rank + c.qk_rope_head_dim
        return 2 * (batch * (dense + sum(experts.values()) * share) + attention), 2 * read


class Step:
    """A decode step of each contender over the same cached tokens. `reset` puts the caches back to `length` tokens."""

    def __init__(self, lab: Lab, batch: int, length: int, compiled: bool) -> None:
        self.lab, self.length, self.compiled = lab, length, compiled
        self.filled = lab.cached(batch, length)
        self.ids = torch.randint(
            lab.config.vocab_size, (batch, 1), generator=lab.generator, device=lab.device
        )
        self.positions = torch.full((batch, 1), length, device=lab.device)
        self.cache = self._static() if compiled else self._dynamic()

    def _dynamic(self) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.lab.config)
        for layer, (latent, rope) in enumerate(self.filled):
            cache.update(latent, rope, layer)
        return cache

    def _static(self) -> Any:
        from transformers import StaticCache

        cache = StaticCache(config=self.lab.config, max_cache_len=self.length + MARGIN)
        for layer, (latent, rope) in enumerate(self.filled):
            cache.update(latent, rope, layer)
        self.filled = []  # the cache holds them
        return cache

    def reset(self) -> None:
        if self.compiled:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.length)
        else:
            for layer, (latent, rope) in zip(self.cache.layers, self.filled, strict=True):
                layer.keys, layer.values = latent, rope

    def function(self, model: Any) -> Callable[[], Tensor]:
        def step(ids: Tensor, positions: Tensor) -> Tensor:
            return model(
                input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True
            ).logits

        if self.compiled:
            step = torch.compile(step, fullgraph=True, dynamic=False, backend=self.lab.size.backend)
        return lambda: step(self.ids, self.positions)

    def logits(self, call: Callable[[], Tensor]) -> Tensor:
        self.reset()
        return call()[:, -1].float().clone()


def prepare(step: Step, call: Callable[[], Tensor]) -> gpu_timing.Timed:
    """One step a replay: in a CUDA graph when compiled, as reduce-overhead would; eagerly with its host time."""
    for _ in range(2):
        step.reset()
        call()
    if step.lab.device.type != "cuda" or not step.compiled:
        return gpu_timing.Timed(call, 1, "eager")
    step.reset()
    torch.cuda.synchronize()
    if gpu_timing.syncs(lambda _: call(), None):
        return gpu_timing.Timed(call, 1, "compiled, waits for the GPU")
    graph = torch.cuda.CUDAGraph()
    step.reset()
    with torch.cuda.graph(graph):
        out = call()
    return gpu_timing.Timed(graph.replay, 1, "compiled, CUDA graph", (graph, out))


def elapsed_us(step: Step) -> Callable[[Callable[[], Any]], float]:
    """Times a replay after an untimed reset."""

    def elapsed(replay: Callable[[], Any]) -> float:
        step.reset()
        if step.lab.device.type == "cuda":
            return gpu_timing._elapsed_us(replay)
        start = time.perf_counter()
        replay()
        return 1e6 * (time.perf_counter() - start)

    return elapsed


def measure(lab: Lab, case: GpuCase, run: str, ceilings: Mapping[str, float], budget_s: float,
            progress: Callable[[str], Any]) -> dict[str, Any]:  # fmt: skip
    """A row. Raises WrongResult where the patched model's logits are not transformers'."""
    batch, length = case.shape["batch"], case.shape["length"]
    step = Step(lab, batch, length, case.shape["mode"] == "compiled")
    timed, others, logits = {}, {}, {}
    for name, model in lab.models.items():
        progress(f"{name}: first steps")
        try:
            call = step.function(model)
            logits[name] = step.logits(call)
            timed[name] = prepare(step, call)
        except torch.OutOfMemoryError:
            others[name] = {"missing": "out of memory"}
        except Exception as error:
            if name == "moekern" or "CUDA error" in str(error):
                raise
            others[name] = {"missing": f"{type(error).__name__}: {error}"[:300]}
    if "moekern" not in timed:
        raise torch.OutOfMemoryError("moekern: out of memory")
    theirs = next((v for n, v in logits.items() if n != "moekern"), logits["moekern"])
    difference = gpu_bench.error_of("model", logits["moekern"], theirs)
    if not difference <= LIMIT:
        raise gpu_bench.WrongResult(f"the patched model's logits differ by {difference:.2g}; limit {LIMIT}")
    progress("timing")
    times = gpu_timing.interleave(timed, budget_s, elapsed_us(step))
    statistics = {name: ledger.statistics_of(values) for name, values in times.items()}
    flops, moved = lab.work(batch, length)
    peers = others | {n: {**statistics[n], "method": t.method} for n, t in timed.items() if n != "moekern"}
    return {
        "op": "model", "case": case.name, "backend": "moekern", "run": run, "method": timed["moekern"].method,
        **statistics["moekern"], "input_sets": 1, "bytes": moved, "flops": flops, "error": difference,
        **ledger.rates_of(statistics["moekern"]["median_us"], flops, moved, case.ceiling, ceilings),
        "source_hash": ledger.hash_for("model", "moekern"), "peers": peers,
    }  # fmt: skip


def _prefixed(name: str, progress: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: progress(f"{name}: {text}")


def rows(lab: Lab, chosen: list[GpuCase], state: dict[str, Any], run: str, budget_s: float,
         progress: Callable[[str], Any], deadline: float = math.inf) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of the cases, those with a goal first; what failed is noted in the state. None is begun after the deadline."""
    ceilings = state["runs"][run]["ceilings"]
    for case in sorted(chosen, key=lambda c: c.at_least is None):
        if time.monotonic() > deadline:
            return
        progress(case.name)
        try:
            yield measure(lab, case, run, ceilings, budget_s, _prefixed(case.name, progress))
        except (torch.OutOfMemoryError, gpu_bench.WrongResult) as error:
            state["failed"][gpu_bench.label(case)] = f"{type(error).__name__}: {error}"[:500]
        finally:
            torch.compiler.reset()
            if lab.device.type == "cuda":
                torch.cuda.empty_cache()


def describe(row: Mapping[str, Any]) -> str:
    shown = {"moekern": row, **row["peers"]}
    times = [
        f"{n} {v['median_us'] / 1e3:.3f} ms" if "median_us" in v else f"{n}: {v['missing']}"
        for n, v in shown.items()
    ]
    ratio = ledger.value_of("speedup", row, {})
    return f"{row['case']}: {', '.join(times)}" + (f"; {ratio:.2f}x" if ratio else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="adds the rows to DIR/gpu.json")
    parser.add_argument("--only", metavar="TEXT", help="only the cases whose name contains TEXT")
    parser.add_argument(
        "--budget", type=float, default=1e9, metavar="S", help="begin no case after S seconds"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="2 tiny layers on the CPU: tries the code, measures nothing"
    )


def run(options: argparse.Namespace) -> int:
    reason = None if options.tiny else machine.cannot_measure()
    if reason is not None:
        print(f"bench e2e: no usable GPU: {reason} (--tiny tries the code on a CPU)", file=sys.stderr)
        return 2
    if options.tiny and options.out is not None:
        raise ValueError("e2e: --tiny measures nothing and writes no rows; run it without --out")
    if not options.tiny and options.out is None:
        raise ValueError("e2e: --out names the directory for the rows")
    from tqdm import tqdm

    deadline = time.monotonic() + options.budget
    size = TINY if options.tiny else Size()
    with tqdm(
        desc=f"{size.layers} layers, random weights", leave=False, disable=None, unit="", unit_scale=True
    ) as bar:
        lab = Lab(size, bar.update)
    cases = [c for c in lab.cases() if options.only is None or options.only in c.name]
    if not cases:
        raise ValueError(f"e2e: no case's name contains {options.only!r}")
    unit = {"gemm_tflops": 1.0, "read_gbytes_per_s": 1.0, "copy_gbytes_per_s": 1.0}
    state: dict[str, Any] = {"runs": {"tiny": {"ceilings": unit}}, "rows": [], "failed": {}}
    name = "tiny"
    if not options.tiny:
        state, name = gpu_bench.start_run(gpu_bench.Options(options.out, 0.0))
    with torch.no_grad(), tqdm(total=len(cases), leave=False, disable=None, unit="case") as bar:
        for row in rows(
            lab, cases, state, name, 0.0 if options.tiny else ROW_S, bar.set_description, deadline
        ):
            state["rows"] = [r for r in state["rows"] if ledger.key_of(r) != ledger.key_of(row)] + [row]
            bar.update()
            bar.write(describe(row))
            if not options.tiny:
                ledger.write_json(options.out / "gpu.json", state)
    for failed, why in state["failed"].items():
        print(f"bench e2e: {failed}: {why}", file=sys.stderr)
    return 1 if state["failed"] else 0
