"""When is a result right? The truth is an fp64 evaluation of the op's definition.

"model": bf16 and fp16 results may err by at most 1.25 times what the model's own code errs (RMS, normalised by the RMS
of the truth, and the largest error, normalised alike); fp32 results by that or by 4 sequential fp32 sums.
"fp32": 4 times the error of a sequential fp32 sum as long as the longest input dimension.
"ids": equal wherever the choice does not hang on rounding. "exact": equal.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from support import call, device_of, evaluate, kinds, make
from torch import Tensor

from moekern._op import Case, OpSpec

MODEL_FACTOR, SUM_FACTOR = 1.25, 4.0
POOL = 2048  # elements over which an error is measured: of 64 alone the largest error varies by a third
MAX_SEEDS = 4
UNSTABLE_SHARE = 0.05  # of the tokens may have ids that hang on rounding


@dataclass(frozen=True)
class Error:
    """Both relative to the RMS of the truth."""

    rms: float
    max: float

    def __mul__(self, factor: float) -> Error:
        return Error(self.rms * factor, self.max * factor)

    def __or__(self, other: Error) -> Error:
        return Error(max(self.rms, other.rms), max(self.max, other.max))


def error_of(got: list[Tensor], truth: list[Tensor]) -> Error:
    """Error of pooled results. What is not finite must be the same on both sides."""
    differences, values = [torch.zeros(1, dtype=torch.float64)], [torch.zeros(1, dtype=torch.float64)]
    for g, t in zip(got, truth, strict=True):
        assert g.shape == t.shape, f"shape {list(g.shape)}, expected {list(t.shape)}"
        g, t = g.double().cpu(), t.double().cpu()
        finite = t.isfinite()
        torch.testing.assert_close(
            g.masked_fill(finite & g.isfinite(), 0), t.masked_fill(finite, 0), rtol=0, atol=0, equal_nan=True,
            msg=lambda m: f"not finite where the truth is, or the reverse: {m}",
        )  # fmt: skip
        differences.append((g - t)[finite])
        values.append(t[finite])
    difference, value = torch.cat(differences), torch.cat(values)
    rms = value.square().mean().sqrt().item() or 1.0
    return Error(difference.square().mean().sqrt().item() / rms, difference.abs().max().item() / rms)


def rounding_of(truth: list[Tensor], dtype: torch.dtype) -> Error:
    """The error that nobody can avoid: that of rounding the truth; at most half a unit in its largest value's last place.

    Where few values are large, which of them rounds luckily would decide between two equally good results.
    """
    error = error_of([t.to(dtype) for t in truth], truth)
    finite = torch.cat([t[t.isfinite()].flatten().cpu() for t in truth])
    if finite.numel() == 0 or finite.abs().max() == 0:
        return error
    half_unit = torch.finfo(dtype).eps / 2 * 2.0 ** torch.frexp(finite.abs().max()).exponent.sub(1).item()
    return Error(error.rms, max(error.max, half_unit / finite.square().mean().sqrt().item()))


@functools.cache
def sequential_sum(length: int) -> Error:
    """What a plain fp32 loop over `length` products errs, measured over random data."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((1024, length), dtype=np.float32) for _ in range(2))
    got = np.cumsum(a * b, axis=1, dtype=np.float32)[:, -1]
    truth = (a.astype(np.float64) * b).sum(1)
    return error_of([torch.from_numpy(got)], [torch.from_numpy(truth)])


def sum_length(arguments: dict[str, Any]) -> int:
    floating = [v for v in arguments.values() if isinstance(v, Tensor) and v.is_floating_point()]
    return max(64, *(n for v in floating for n in v.shape))


def in_fp64(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


@dataclass(frozen=True)
class Sample:
    arguments: dict[str, Any]
    truth: tuple[Tensor, ...]
    model: tuple[Tensor, ...]


@functools.lru_cache(maxsize=3)  # the variants of one case follow each other
def samples(
    name: str, case: Case, dtype: torch.dtype, device: str, seeds: int, pool: int
) -> tuple[Sample, ...]:
    """Inputs of one case with the truth and what the model's own code makes of them, enough to fill the pool."""
    from moekern.ops import SPECS

    spec, found, size = SPECS[name], [], 0
    for seed in range(seeds):
        arguments = make(spec, case, dtype, seed, device)
        truth = evaluate(spec, spec.ref, in_fp64(arguments))
        model = evaluate(spec, spec.model or spec.ref, arguments)
        found.append(Sample(arguments, truth, model))
        size += max((t.numel() for t in truth), default=0)
        if size >= pool or size == 0:
            break
    return tuple(found)


def check_ids(spec: OpSpec, sample: Sample, index: int, got: Tensor) -> Tensor:
    """Rows [T] of ids that are those of the truth. A row that differs must hang on rounding."""
    truth = sample.truth[index]
    assert got.shape == truth.shape
    same = (got == truth.to(got.dtype)).all(-1)
    if not same.all():
        generator = torch.Generator().manual_seed(0)
        stable = torch.ones_like(same)
        for _ in range(8):
            noisy = {
                n: v * (1 + 2**-20 * torch.randn(v.shape, generator=generator, dtype=v.dtype).to(v.device))
                if isinstance(v, Tensor) and v.is_floating_point() else v
                for n, v in in_fp64(sample.arguments).items()
            }  # fmt: skip
            stable &= (evaluate(spec, spec.ref, noisy)[index] == truth).all(-1)
        wrong = (~same & stable).nonzero().flatten().tolist()
        assert not wrong, (
            f"ids differ in rows {wrong[:8]}, where the fp64 gap exceeds rounding: "
            f"got {got[wrong[0]].tolist()}, expected {truth[wrong[0]].tolist()}"
        )
        allowed = 1 + UNSTABLE_SHARE * same.numel()
        assert (~same).sum() <= allowed, f"ids differ in {(~same).sum()} of {same.numel()} rows"
    return same


def check_case(
    spec: OpSpec, variant: str, dtype: torch.dtype, case: Case
) -> list[tuple[dict[str, Any], tuple[Tensor, ...]]]:
    """One backend on one case against the yardstick; returns the arguments and results of each sample."""
    few = 1 if variant == "triton" or not case.small else MAX_SEEDS
    try:
        return judge(spec, variant, dtype, case, few, POOL)
    except AssertionError:
        # The largest of a few errors is a matter of luck; a wrong kernel stays wrong over a larger pool.
        return judge(spec, variant, dtype, case, few * 8, POOL * 8)


def judge(
    spec: OpSpec, variant: str, dtype: torch.dtype, case: Case, seeds: int, pool: int
) -> list[tuple[dict[str, Any], tuple[Tensor, ...]]]:
    found = samples(spec.name, case, dtype, str(device_of(variant)), seeds, pool)
    results = [call(spec, variant, sample.arguments) for sample in found]
    check_results(spec, list(found), results, dtype)
    return [(s.arguments, r) for s, r in zip(found, results, strict=True)]


def check_results(
    spec: OpSpec,
    found: list[Sample],
    results: list[tuple[Tensor, ...]],
    dtype: torch.dtype,
    slack: float = 1.0,
) -> None:
    """Judges results of an op by the kind of each output."""
    which = kinds(spec)
    rows: list[Tensor | None] = [None] * len(found)  # tokens whose ids are those of the truth
    if "ids" in which:
        index = which.index("ids")
        rows = [check_ids(spec, s, index, r[index]) for s, r in zip(found, results, strict=True)]
    for i, kind in enumerate(which):
        got = [r[i] for r in results]
        if kind == "exact":
            for g, sample in zip(got, found, strict=True):
                torch.testing.assert_close(g, sample.truth[i].to(g.dtype), rtol=0, atol=0, equal_nan=True)
        elif kind != "ids":
            truth, model = [s.truth[i] for s in found], [s.model[i] for s in found]
            if kind == "fp32" and "ids" in which:
                got, truth = ([v if k is None else v[k] for v, k in zip(side, rows, strict=True)]
                              for side in (got, truth))  # fmt: skip
            check_error(got, truth, model, kind, dtype, sum_length(found[0].arguments), f"output {i}", slack)


def check_error(
    got: list[Tensor],
    truth: list[Tensor],
    model: list[Tensor],
    kind: str,
    dtype: torch.dtype,
    length: int,
    what: str,
    slack: float = 1.0,
) -> None:
    """One floating result against its bound; `slack` widens it where the sample is small."""
    bound = sequential_sum(length) * SUM_FACTOR
    if kind == "model":
        allowed = (error_of(model, truth) | rounding_of(truth, dtype)) * MODEL_FACTOR
        bound = bound | allowed if dtype == torch.float32 else allowed
    ours, bound = error_of(got, truth), bound * slack
    assert ours.rms <= bound.rms, f"{what}: RMS error {ours.rms:.3g}, at most {bound.rms:.3g} allowed"
    assert ours.max <= bound.max, f"{what}: largest error {ours.max:.3g}, at most {bound.max:.3g} allowed"
