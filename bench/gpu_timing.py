"""GPU times from CUDA graphs: many launches of one function in a graph, the graph's time by its events divided by them.

Eagerly a launch of a few microseconds is hidden behind 10 and more on the host; in a graph, as in a decode loop that is
captured, it is not. The launches of a graph go round over several sets of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MIN_LAUNCHES, MAX_LAUNCHES, MAX_SETS = 64, 512, 512


def set_count(input_bytes: int, l2_bytes: int) -> int:
    """Sets of inputs that are four times the L2 together; at most MAX_SETS, so that tiny inputs stay in the cache, as
    router logits do behind the GEMM that wrote them."""
    return max(2, min(MAX_SETS, -(-4 * l2_bytes // max(input_bytes, 1))))


def launch_count(sets: int) -> int:
    """Launches in a graph: whole rounds over the sets."""
    rounds = max(1, -(-MIN_LAUNCHES // sets))
    return min(MAX_LAUNCHES, rounds * sets)


def graph_of(call: Callable[[Any], Any], inputs: Sequence[Any], launches: int) -> torch.cuda.CUDAGraph:
    """A graph of `launches` calls. Warms up first, on a side stream as capture demands: compilation is not captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for value in inputs[:3]:
            call(value)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            call(inputs[i % len(inputs)])
    return graph


def replay_times(graph: torch.cuda.CUDAGraph, launches: int, replays: int) -> list[float]:
    """Microseconds per launch of each replay."""
    for _ in range(3):
        graph.replay()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)
    ]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) / launches for start, end in events]


def time_in_graph(call: Callable[[Any], Any], inputs: Sequence[Any], replays: int = 50) -> list[float]:
    """Microseconds per call, one value for each replay of the graph."""
    launches = launch_count(len(inputs))
    return replay_times(graph_of(call, inputs, launches), launches, replays)


def empty_node_times() -> list[float]:
    """What a launch that does next to nothing (one element, in place) costs in a graph: the floor under every row."""
    one = torch.zeros(1, device="cuda")
    return time_in_graph(lambda x: x.add_(1), [one])


def copy_bandwidth(num_bytes: int = 2 << 30) -> float:
    """GB/s of a device-to-device copy of random data, bytes read and bytes written both counted."""
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy(_: Tensor) -> None:
        target.copy_(source)

    graph = graph_of(copy, [source], 4)
    times = sorted(replay_times(graph, 4, 9))
    return 2 * num_bytes / times[len(times) // 2] / 1e3
