"""Whether a kernel pays on this device: it and the library's way are timed side by side when the model is loaded."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TypeAlias

import torch

Run: TypeAlias = Callable[[], object]
Timer: TypeAlias = Callable[[Run, Run], tuple[float, float]]
"""Gives the microseconds of a kernel and of the library's way."""

GAIN = 0.03
"""Share of the library's time that a kernel has to spare: less may be the timing's own error."""
_SAMPLES = 5


def pays(kernel: float, library: float) -> bool:
    """Whether a kernel of these microseconds is kept; not for NaN."""
    return kernel <= (1 - GAIN) * library


def graph_timer(kernel: Run, library: Run) -> tuple[float, float]:
    """Medians of replays of a CUDA graph of each, in turn, each after other data has filled the L2 cache.

    In an engine a draft's weights are not in the cache either, where target and drafter are larger than it.  At a
    model of 8B the five replays of both take about 5 ms.
    """
    device = torch.cuda.current_device()
    filler = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    graphs = [_captured(run) for run in (kernel, library)]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_SAMPLES):
        for graph, found in zip(graphs, times, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            filler.zero_()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times[0]), statistics.median(times[1])


def _captured(run: Run) -> torch.cuda.CUDAGraph:
    """A graph of one call, replayed once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and makes the workspaces of the libraries
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph
