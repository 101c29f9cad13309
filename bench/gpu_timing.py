"""GPU times: many calls in a CUDA graph, the graph's time by its events divided by them; the contenders of a case in turns.

Eagerly a launch of a few microseconds is hidden behind 10 and more on the host; in a graph, as in a decode loop that is
captured, it is not. What cannot be captured is timed eagerly, and says so. The calls go round over several sets of inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Of one replay: long enough that the events' 0.5 us do not count, short enough for 20 rounds within a second.
REPLAY_US = 5000.0
MAX_CALLS = 1024
MIN_ROUNDS, MAX_ROUNDS = 10, 50


def call_count(sets: int, call_us: float) -> int:
    """Calls in one replay: whole rounds over the sets, some REPLAY_US long together."""
    rounds = max(1, round(REPLAY_US / max(call_us, 0.5) / sets))
    return max(sets, min(rounds * sets, MAX_CALLS // sets * sets))


@dataclass
class Timed:
    """Something to time. replay: puts `calls` calls on the stream. method: "graph" or "eager"."""

    replay: Callable[[], Any]
    calls: int
    method: str
    keep: Any = None  # what the graph reads and writes must stay allocated


def _elapsed_us(work: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def syncs(call: Callable[[Any], Any], value: Any) -> bool:
    """Whether a call waits for the GPU, which no capture survives."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(value)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return False


def prepare(call: Callable[[Any], Any], inputs: Sequence[Any], capturable: bool = True) -> Timed:
    """Warms a call up (compilation is not captured) and captures it. Where it cannot be captured, the same calls eagerly."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for value in inputs[:3]:
            call(value)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    once = min(_elapsed_us(lambda: call(inputs[0])) for _ in range(3))
    calls = call_count(len(inputs), once)

    def every() -> None:
        for i in range(calls):
            call(inputs[i % len(inputs)])

    if not capturable or syncs(call, inputs[0]):
        return Timed(every, calls, "eager")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        every()
    return Timed(graph.replay, calls, "graph", (graph, inputs))


def interleave(
    contenders: Mapping[str, Timed],
    budget_s: float,
    elapsed_us: Callable[[Callable[[], Any]], float] = _elapsed_us,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Microseconds per call, one value a replay. Rounds of one replay each, the first of a round changing, so that drift of
    clocks and temperature falls on all; at least MIN_ROUNDS, as long as the budget lasts."""
    for timed in contenders.values():
        elapsed_us(timed.replay)
    found: dict[str, list[float]] = {name: [] for name in contenders}
    names, start = list(contenders), clock()
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and clock() - start > budget_s:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            timed = contenders[name]
            found[name].append(elapsed_us(timed.replay) / timed.calls)
    return found


def host_times(
    call: Callable[[Any], Any], inputs: Sequence[Any], samples: int = 60, calls: int = 20
) -> list[float]:
    """Microseconds of host time per eager call: the GPU is waited for between samples of `calls` calls, never within, and
    the launch queue (1024 deep) does not fill up."""
    for value in inputs[:3]:
        call(value)
    found = []
    for _ in range(samples):
        _synchronize()
        start = time.perf_counter()
        for i in range(calls):
            call(inputs[i % len(inputs)])
        found.append(1e6 * (time.perf_counter() - start) / calls)
    _synchronize()
    return found


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _best_us(call: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    timed = prepare(call, inputs)
    return sorted(interleave({"": timed}, 0.5)[""])[0]


def ceilings(num_bytes: int = 2 << 30, size: int = 8192, device: str = "cuda") -> dict[str, float]:
    """What this device reaches on random data: a bf16 GEMM, reading, copying (bytes read and written both counted), and a
    graph node that does next to nothing. Ceilings are best times; a row's own time is a median."""
    from bench.read_kernel import TILE_BYTES, read_all

    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    gemm_us = _best_us(lambda matrices: torch.mm(matrices[0], matrices[1], out=matrices[2]), [(a, b, out)])
    free = torch.cuda.mem_get_info()[0]
    num_bytes = min(num_bytes, free // 4) // TILE_BYTES * TILE_BYTES
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device).view(torch.int32)
    target = torch.empty_like(data)
    read_us = min(_best_us(read_all, [data]), _best_us(lambda x: torch.sum(x.view(torch.float32)), [data]))
    copy_us = _best_us(lambda x: target.copy_(x), [data])
    one = torch.zeros(1, device=device)
    node = interleave({"": prepare(lambda x: x.add_(1), [one])}, 0.5)[""]
    return {
        "gemm_tflops": 2 * size**3 / gemm_us / 1e6,
        "read_gbytes_per_s": num_bytes / read_us / 1e3,
        "copy_gbytes_per_s": 2 * num_bytes / copy_us / 1e3,
        "empty_node_us": sorted(node)[len(node) // 2],
    }
