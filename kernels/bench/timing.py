"""Timing on a CUDA device: CUDA graphs, the copy bandwidth and what the machine is."""

from __future__ import annotations

import datetime
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch


def l2_bytes() -> int:
    """Size of the L2 cache."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def graph_microseconds(calls: list[Callable[[], object]], milliseconds: float = 120, replays: int = 25) -> float:
    """Median time of one call, all of them captured in one CUDA graph; at most about ``milliseconds`` of replays."""
    return in_turn([captured(calls)], milliseconds, replays)[0] / len(calls)


@dataclass
class Captured:
    """A CUDA graph of some calls, and what the last replay left."""

    graph: torch.cuda.CUDAGraph
    results: list[Any]


def in_turn(captured: list[Captured], milliseconds: float = 120, replays: int = 25) -> list[float]:
    """Median microseconds of a replay of each, replayed in turn, so that the machine's changes meet all alike."""
    times: list[list[float]] = [[] for _ in captured]
    while len(times[0]) < replays and (len(times[0]) < 5 or max(map(sum, times)) < milliseconds):
        for one, found in zip(captured, times, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            one.graph.replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
    return [statistics.median(found) * 1e3 for found in times]


def captured(calls: list[Callable[[], object]]) -> Captured:
    """All calls in one CUDA graph, replayed once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, tunes and makes the workspaces of the libraries
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    graph.replay()
    torch.cuda.synchronize()
    return Captured(graph, kept)


def read_gigabytes_per_second(megabytes: int = 1024) -> float:
    """Bytes read over the time of a reduction of a large tensor, which writes next to nothing.

    What a kernel that only reads weights can reach: a copy turns the memory's bus around all the time.
    """
    source = torch.zeros(megabytes << 18, dtype=torch.float32, device="cuda")
    return source.nbytes / graph_microseconds([lambda: source.amax()]) / 1e3


def clock_mhz() -> int | None:
    """The multiprocessors' clock now; None where the driver's library is not there to ask."""
    try:
        return int(torch.cuda.clock_rate())
    except (ImportError, RuntimeError, AttributeError):
        return None


def copy_gigabytes_per_second(megabytes: int = 1024) -> float:
    """Bytes read plus bytes written over the time of a large device-to-device copy."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_microseconds([lambda: target.copy_(source)]) / 1e3


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, str | int | None]:
    """Device, versions and date, to be kept beside every figure."""
    record: dict[str, str | int | None] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": "CPU, Triton's interpreter",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "vllm-gumiho": _version("vllm-gumiho"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        record |= {
            "device": properties.name,
            "processors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return record
