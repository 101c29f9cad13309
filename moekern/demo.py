"""`moekern demo`: one model, generating real text before and after `moekern.patch`, in one table.

The weights are random (nothing is downloaded), of a published model's layer shapes: speed and memory are those of the
real layers, the text that comes out means nothing. What is checked is that it is the same text.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import moekern
from moekern import random_models

BYTE_OFFSET = 3  # byte-level tokens as ByT5 numbers them: 0 to 2 are special
COMPARED = 256  # prompt positions whose next token is compared: lm_head over all of 4096 would take 0.8 GB

PACKAGE = Path(__file__).parent


def read_text(num_bytes: int) -> tuple[bytes, list[str]]:
    """The first `num_bytes` of README, docs and sources, one after the other, and the names of what was used.

    Raises ValueError when there is less: text that repeats would make routing and attention unlike real use.
    """
    root = PACKAGE.parent
    texts: list[tuple[str, bytes]] = []
    if (root / "pyproject.toml").exists() and (root / "README.md").exists():
        pages = [root / "README.md", *sorted((root / "docs").glob("*.md")), *sorted(root.glob("C*.md"))]
        texts += [(str(page.relative_to(root)), page.read_bytes()) for page in pages]
    else:  # installed: the README is the description in the package's metadata
        try:
            description = importlib.metadata.metadata("moekern").json.get("description", "")
        except importlib.metadata.PackageNotFoundError:
            description = ""
        texts.append(("README", str(description).encode()))
    texts += [(str(path.relative_to(root)), path.read_bytes()) for path in sorted(PACKAGE.rglob("*.py"))]
    taken, names = b"", []
    for name, text in texts:
        if len(taken) >= num_bytes:
            break
        if text:
            taken += text[: num_bytes - len(taken)]
            names.append(name)
    if len(taken) < num_bytes:
        raise ValueError(
            f"demo: --prompt-tokens must be at most {len(taken)}, the bytes of text at hand; got {num_bytes}"
        )
    return taken, names


def reset_peak_memory() -> bool:
    """Makes VmHWM start again from what is resident now; False where the kernel does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Bytes resident at most since `reset_peak_memory`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("demo: /proc/self/status has no VmHWM")


@dataclass
class Run:
    """One generation. tokens: what was generated; prompt_argmax: the model's next token at the last COMPARED prompt
    positions; cache: the KV cache it left; peak_bytes: None where it cannot be measured."""

    tokens: list[int]
    prompt_argmax: torch.Tensor
    cache: Any
    first_token_s: float
    step_s: list[float]
    peak_bytes: int | None

    @property
    def tokens_per_s(self) -> float:
        return 1.0 / statistics.median(self.step_s)


class Clock:
    """A streamer for `generate`: notes when each token arrives. The first call brings the prompt."""

    def __init__(self, bar: Any) -> None:
        self.times: list[float] = []
        self.bar = bar

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > 1:
            self.bar.update()

    def end(self) -> None:
        pass


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def generate(model: Any, prompt: torch.Tensor, new_tokens: int, label: str, quiet: bool) -> Run:
    """Greedy generation with a dynamic cache through the model's own `generate`, timed token by token."""
    from tqdm import tqdm

    body = model.get_decoder()
    layers = body.layers
    hidden: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: torch.Tensor) -> None:
        if output.shape[1] > 1:
            hidden.append(output[:, -COMPARED:].clone())

    def advance(_: Any, inputs: Any, keywords: Any, __: Any) -> None:
        states = inputs[0] if inputs else keywords["hidden_states"]
        if states.shape[1] > 1:
            bar.update()

    gc.collect()
    measured = reset_peak_memory()
    with tqdm(
        total=len(layers) + new_tokens, desc=label, leave=False, disable=quiet or None, unit="step"
    ) as bar:
        handles = [layer.register_forward_hook(advance, with_kwargs=True) for layer in layers]
        handles.append(body.norm.register_forward_hook(keep))
        clock = Clock(bar)
        start = time.perf_counter()
        with hooks(*handles):
            output = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False,
                return_dict_in_generate=True, streamer=clock,
            )  # fmt: skip
    peak = peak_memory() if measured else None
    with torch.no_grad():
        prompt_argmax = model.lm_head(hidden[0])[0].argmax(-1)
    times = clock.times[1:]
    return Run(
        tokens=output.sequences[0, prompt.shape[1] :].tolist(),
        prompt_argmax=prompt_argmax,
        cache=output.past_key_values,
        first_token_s=times[0] - start,
        step_s=[b - a for a, b in itertools.pairwise(times)],
        peak_bytes=peak,
    )


def forced_agreement(model: Any, run: Run, prompt_tokens: int, forced: list[int]) -> int:
    """How many of the `forced` tokens the model chooses itself when it is fed them, from the cache that `run` left."""
    for layer in run.cache.layers:
        layer.keys = layer.keys[..., :prompt_tokens, :]
        layer.values = layer.values[..., :prompt_tokens, :]
    agreed = int(run.tokens[0] == forced[0])
    with torch.no_grad():
        for token, following in itertools.pairwise(forced):
            logits = model(
                input_ids=torch.tensor([[token]]), past_key_values=run.cache, use_cache=True
            ).logits
            agreed += int(logits[0, -1].argmax()) == following
    return agreed


def build(options: argparse.Namespace, layers: int, dtype: torch.dtype) -> Any:
    from tqdm import tqdm

    length = options.prompt_tokens + options.new_tokens
    config = random_models.make_config(options.model_type, layers, length, tiny=options.tiny)
    with torch.device("meta"):
        total = sum(p.numel() for p in random_models.empty_model(config, dtype).parameters())
    label = f"{layers}-layer {options.model_type}, {dtype_name(dtype)}, random weights"
    with tqdm(
        total=total, desc=label, leave=False, disable=options.quiet or None, unit="", unit_scale=True
    ) as bar:
        return random_models.build_model(config, dtype, seed=options.seed, progress=bar.update)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_pair(
    model: Any, prompt: torch.Tensor, new_tokens: int, name: str, quiet: bool
) -> tuple[Run, Run, Any]:
    """The same generation by the model as it is and patched, and the report of `patch`. Leaves the model patched."""
    warm_up = prompt[:, :32]  # first calls pay for lazy imports and kernels' set-up
    generate(model, warm_up, 2, f"{name}: warming up transformers", quiet)
    before = generate(model, prompt, new_tokens, f"{name}: transformers", quiet)
    report = moekern.patch(model)
    generate(model, warm_up, 2, f"{name}: warming up moekern", quiet)
    after = generate(model, prompt, new_tokens, f"{name}: moekern", quiet)
    return before, after, report


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the demo; returns what the table and --json show."""
    text, names = read_text(options.prompt_tokens)
    prompt = torch.tensor([[byte + BYTE_OFFSET for byte in text]])
    dtype = getattr(torch, options.dtype)

    model = build(options, options.layers, dtype)
    parameters = sum(p.numel() for p in model.parameters())
    before, after, report = run_pair(model, prompt, options.new_tokens, options.dtype, options.quiet)
    agreed = forced_agreement(model, after, options.prompt_tokens, before.tokens)
    same = before.prompt_argmax == after.prompt_argmax
    del model
    gc.collect()

    short = prompt[:, : min(options.prompt_tokens, 256)]
    exact = build(options, min(options.layers, 2), torch.float32)
    exact_before, exact_after, _ = run_pair(exact, short, options.new_tokens, "float32", options.quiet)

    return {
        "model": {
            "type": options.model_type, "layers": options.layers, "parameters": parameters, "dtype": options.dtype,
            "seed": options.seed,
        },
        "prompt": {"tokens": options.prompt_tokens, "new_tokens": options.new_tokens, "text": names},
        "threads": torch.get_num_threads(),
        "patched": [entry.name for entry in report.patched],
        "skipped": {entry.name: entry.reason for entry in report.skipped},
        "transformers": summary(before),
        "moekern": summary(after),
        "speedup": {
            "first_token": before.first_token_s / after.first_token_s,
            "decode": after.tokens_per_s / before.tokens_per_s,
        },
        "agreement": {
            "generated": agreed, "generated_of": len(before.tokens), "prompt": int(same.sum()), "prompt_of": len(same),
        },
        "float32": {
            "layers": min(options.layers, 2), "prompt_tokens": short.shape[1],
            "identical": exact_before.tokens == exact_after.tokens,
            "transformers": exact_before.tokens, "moekern": exact_after.tokens,
        },
    }  # fmt: skip


def summary(run: Run) -> dict[str, Any]:
    return {
        "first_token_s": run.first_token_s,
        "tokens_per_s": run.tokens_per_s,
        "peak_memory_bytes": run.peak_bytes,
        "tokens": run.tokens,
    }


def memory_text(num_bytes: int | None) -> str:
    return "not measured" if num_bytes is None else f"{num_bytes / 2**30:.2f} GiB"


def table(found: dict[str, Any]) -> str:
    """The result as text."""
    before, after, speedup = found["transformers"], found["moekern"], found["speedup"]
    agreement, exact, dtype = found["agreement"], found["float32"], found["model"]["dtype"]
    generated = f"{agreement['generated']}/{agreement['generated_of']}"
    prompt = f"{agreement['prompt']}/{agreement['prompt_of']}"
    count = len(exact["transformers"])
    equal = sum(a == b for a, b in zip(exact["transformers"], exact["moekern"], strict=True))
    rows = [
        ("", "transformers", "moekern", "speed-up"),
        ("time to first token", f"{before['first_token_s']:.2f} s", f"{after['first_token_s']:.2f} s",
         f"{speedup['first_token']:.2f}x"),
        ("decode", f"{before['tokens_per_s']:.2f} tokens/s", f"{after['tokens_per_s']:.2f} tokens/s",
         f"{speedup['decode']:.2f}x"),
        ("peak memory", memory_text(before["peak_memory_bytes"]), memory_text(after["peak_memory_bytes"]), ""),
        (f"{dtype} next tokens agree, generated", "", generated, ""),
        (f"{dtype} next tokens agree, prompt", "", prompt, ""),
        (f"float32 tokens ({exact['layers']} layers, {exact['prompt_tokens']} prompt tokens)", "",
         f"{'identical' if exact['identical'] else 'DIFFERENT'}, {equal}/{count}", ""),
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{row[0]:<{widths[0]}}  " + "  ".join(f"{row[i]:>{widths[i]}}" for i in range(1, 4)) for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-type", choices=sorted(random_models.PRESETS), default="deepseek_v2")
    parser.add_argument("--layers", type=at_least_two, default=3, metavar="N")
    parser.add_argument(
        "--prompt-tokens", type=at_least_two, default=4096, metavar="N", help="bytes of text (default 4096)"
    )
    parser.add_argument(
        "--new-tokens", type=at_least_two, default=32, metavar="N", help="tokens to generate (default 32)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random weights (default 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: its own choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="no progress bars (there are none when the output is not a terminal)",
    )
    parser.add_argument("--tiny", action="store_true", help="shrink every width, to try the demo in seconds")


def at_least_two(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2; got {value}")
    return value


def run(options: argparse.Namespace) -> int:
    """The exit status: 0 when everything that was recognised could be compared and the fp32 tokens are the same."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        print('moekern demo needs transformers: pip install "moekern[hf]"', file=sys.stderr)
        return 1
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        found = measure(options)
    except ValueError as error:  # too little text, nothing to patch
        print(f"moekern {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    model, prompt = found["model"], found["prompt"]
    print(
        f"{model['type']}, {model['layers']} layers, {model['parameters'] / 1e9:.2f} billion random parameters in "
        f"{model['dtype']}, {found['threads']} threads\n"
        f"{prompt['tokens']} tokens of {', '.join(prompt['text'][:3])}{' ...' if len(prompt['text']) > 3 else ''}; "
        f"{prompt['new_tokens']} tokens generated\n"
        f"{len(found['patched'])} modules patched, {len(found['skipped'])} skipped"
    )
    for name, reason in found["skipped"].items():
        print(f"  {name} skipped: {reason}")
    print("\n" + table(found))
    if not found["patched"]:
        print("\nmoekern demo: nothing was patched", file=sys.stderr)
        return 1
    if not found["float32"]["identical"]:
        print("\nmoekern demo: the float32 tokens differ", file=sys.stderr)
        return 1
    return 0
