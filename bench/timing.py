"""Interleaved timing of contenders that do the same work."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# A contender whose best time is this much slower than the fastest of its group is not measured again, after so many
# rounds: a disturbance of one round must not strike out what would have been the best.
HOPELESS = {1: 3.0, 2: 1.5}


def _nothing(_: int) -> None:
    pass


@dataclass
class Contender:
    """run(i): the work that is timed, on the i-th set of data. before(i): what is put in place, untimed."""

    run: Callable[[int], Any]
    before: Callable[[int], Any] = _nothing
    group: str = "transformers"


@dataclass
class Timing:
    """Seconds of each measured call."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float | int]:
        ordered = sorted(self.seconds)
        last = len(ordered) - 1
        return {
            "median_ms": 1e3 * self.median,
            "min_ms": 1e3 * ordered[0],
            "p10_ms": 1e3 * ordered[round(0.1 * last)],
            "p90_ms": 1e3 * ordered[round(0.9 * last)],
            "calls": len(ordered),
        }


def interleave(
    contenders: Mapping[str, Contender],
    *,
    budget_s: float,
    min_rounds: int,
    max_rounds: int = 200,
    warm_up: bool = True,
    progress: Callable[[str], Any] = lambda name: None,
) -> dict[str, Timing]:
    """Times the contenders in rounds, each once a round and the first of a round changing, so that drift of the
    machine falls on all of them. No two calls share a data index: data that one call brought into the cache is not
    there for the next. Stops after `budget_s` seconds and at least `min_rounds` rounds."""
    timings = {name: Timing() for name in contenders}
    running = list(contenders)
    index = 0

    def call(name: str) -> float:
        nonlocal index
        contender = contenders[name]
        contender.before(index)
        progress(name)
        start = time.perf_counter()
        contender.run(index)
        seconds = time.perf_counter() - start
        index += 1
        return seconds

    if warm_up:
        for name in running:
            call(name)
    gc.collect()
    start = time.perf_counter()
    for rounds in range(max_rounds):
        if rounds >= min_rounds and time.perf_counter() - start > budget_s:
            break
        turn = rounds % len(running)
        for name in running[turn:] + running[:turn]:
            timings[name].seconds.append(call(name))
        if rounds + 1 in HOPELESS:
            limit = HOPELESS[rounds + 1]
            best = {name: min(timings[name].seconds) for name in running}
            running = [
                name
                for name in running
                if best[name]
                <= limit * min(t for n, t in best.items() if contenders[n].group == contenders[name].group)
            ]
    return timings
