"""The parallel heads by the fastest path that the device, the dtypes and the batch allow."""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

import torch
from torch import Tensor

from vllm_gumiho.kernels.device import capability, converts_e4m3, interpreting
from vllm_gumiho.kernels.eight_bit.reference import is_eight_bit
from vllm_gumiho.kernels.parallel_heads.batched import parallel_heads_batched
from vllm_gumiho.kernels.parallel_heads.reference import GAVE_UP, HeadScales, HeadWeights
from vllm_gumiho.kernels.parallel_heads.tiling import MAX_BATCH, Device, choose_tiling


class HeadsPath(str, Enum):
    """How the heads are computed."""

    FUSED = "one Triton launch"
    DEPENDENT = "overlapping Triton launches"
    STAGES = "one Triton launch per stage"
    BATCHED = "batched matrix products"


launches: Counter[HeadsPath] = Counter()
"""Calls so far by path; a replayed CUDA graph counts once, at its capture."""


@functools.cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    per_processor = properties.shared_memory_per_multiprocessor
    per_program = getattr(properties, "shared_memory_per_block_optin", per_processor)
    amd = torch.version.hip is not None
    shared = per_processor, per_program or per_processor
    return Device(properties.multi_processor_count, *shared, amd and converts_e4m3(capability(index)), amd, not amd)


@functools.cache
def single_launch_problem(index: int) -> str | None:
    """Why programs of NVIDIA device ``index`` may not wait for each other within a launch; None where they may."""

    def attribute(number: int) -> int:
        device, value = ctypes.c_int(), ctypes.c_int()
        if driver.cuDeviceGet(ctypes.byref(device), index):
            return 0
        return 0 if driver.cuDeviceGetAttribute(ctypes.byref(value), number, device) else value.value

    try:
        driver = ctypes.CDLL("libcuda.so.1")
        if attribute(_COOPERATIVE_LAUNCH) != 1:
            return "the driver offers no cooperative launch, which the barrier inside the launch needs"
        # Another process's programs may hold the processors that a waiting launch needs.
        return "MPS shares the GPU among processes" if attribute(_MPS_ENABLED) else None
    except (OSError, AttributeError) as error:
        return f"the driver cannot be asked for cooperative launches ({type(error).__name__})"


_COOPERATIVE_LAUNCH = 95  # CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH
_MPS_ENABLED = 133  # CU_DEVICE_ATTRIBUTE_MPS_ENABLED
# In place of a GPU under the interpreter: few programs, so that each gets several tiles.
_INTERPRETED = Device(processors=2, shared_per_processor=228 << 10, shared_per_program=227 << 10, packed=False)


def device_of(device: torch.device) -> Device:
    """What the choice of tiles depends on; of a CPU, what the interpreter runs."""
    return _INTERPRETED if device.type == "cpu" else _device(device.index or 0)


def _heads_inputs(m: Tensor | Sequence[Tensor], hidden: int) -> tuple[Tensor, Tensor]:
    """m as ``rest [B, (S-1)*H]`` and ``last [B, H]``.  Copies nothing for a tensor or up to two column blocks."""
    if isinstance(m, Tensor):
        m = m if m.stride(-1) == 1 else m.contiguous()
        return m[:, : m.shape[1] - hidden], m[:, m.shape[1] - hidden :]
    *others, last = m
    if len(others) < 2:
        return (others[0] if others else last[:, :0]), last
    return torch.cat(others, dim=-1), last


def offered_paths(m: Tensor, path: HeadsPath) -> list[HeadsPath]:
    """The kernels that the device of ``m`` offers where `choose_path` names ``path``, the most demanding first."""
    if path is HeadsPath.BATCHED:
        return []
    overlap = m.device.type == "cuda" and launches_overlap(m.device.index or 0)
    dependent = [HeadsPath.DEPENDENT] if overlap else []
    return [*([path] if path is HeadsPath.FUSED else ()), *dependent, HeadsPath.STAGES]


@functools.cache
def launches_overlap(index: int) -> bool:
    """Whether device ``index`` and Triton have programmatic dependent launch: from Hopper on."""
    found = capability(index)
    if isinstance(found, str) or found < (9, 0):
        return False
    from vllm_gumiho.kernels.parallel_heads.triton import gdc_wait

    return gdc_wait is not None


def choose_path(m: Tensor, weights: HeadWeights, scales: HeadScales | None = None) -> tuple[HeadsPath, str]:
    """The path for inputs like these, and why.  Reads devices, dtypes and shapes, of m the first dimension only."""
    batch, hidden = m.shape[0], weights.weight.shape[-1]
    if m.device.type == "cpu" and not interpreting():
        return HeadsPath.BATCHED, "the heads are on the CPU"
    if m.device.type not in ("cpu", "cuda"):
        return HeadsPath.BATCHED, f"no Triton kernel for device type {m.device.type}"
    if m.dtype not in (torch.float32, torch.bfloat16, torch.float16) or hidden % 16:
        return HeadsPath.BATCHED, f"no Triton kernel for {m.dtype} and H={hidden}"
    if not (weights.weight.dtype == m.dtype if scales is None else is_eight_bit(weights.weight.dtype)):
        return HeadsPath.BATCHED, f"no Triton kernel for {weights.weight.dtype} weights and {m.dtype} inputs"
    if batch > MAX_BATCH and scales is None:
        return HeadsPath.BATCHED, f"batch {batch} is above {MAX_BATCH}"
    if m.device.type == "cpu":
        return HeadsPath.STAGES, "Triton's interpreter runs programs one after the other, so none may wait"
    if torch.version.hip is not None:
        # The barrier of a workgroup's threads waits for shared memory only there, not for global stores.
        return HeadsPath.STAGES, "the barrier inside the launch is built for NVIDIA devices"
    problem = single_launch_problem(m.device.index or 0)
    return (HeadsPath.FUSED, f"batch {batch} fits one launch") if problem is None else (HeadsPath.STAGES, problem)


_kept_counters: dict[torch.device, Tensor] = {}


def new_counters(device: torch.device) -> Tensor:
    """Barrier counters ``[6]`` int32, zero; every launch leaves the first one zero and sets the next four anew.

    The last, at `GAVE_UP`, stays set once a wait has given up.  Two launches that may run at the same time need two
    sets.
    """
    return torch.zeros(GAVE_UP + 1, dtype=torch.int32, device=device)


def _counters(device: torch.device) -> Tensor:
    """The device's set for callers without one of their own, made at the first call."""
    if device not in _kept_counters:
        if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
            # Zeroed within the graph at each replay; memory of a graph must not be kept for others.
            return new_counters(device)
        _kept_counters[device] = new_counters(device)
        torch.cuda.current_stream(device).synchronize()  # other streams will use them without waiting for this one
    return _kept_counters[device]


def parallel_heads(
    m: Tensor | Sequence[Tensor],
    weights: HeadWeights,
    scales: HeadScales | None = None,
    path: HeadsPath | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """``m [B, S*H]`` -> ``z [n, B, H]`` in m's dtype; every path follows `parallel_heads_reference`.

    m: also as its S column blocks ``[B, H]``, of which the kernel reads one or two where they lie.  Its z is a view of
    ``[B, n, H]`` in memory.
    scales: with 8-bit weights, and only with them.  path: None for the one `choose_path` names.
    counters: `new_counters` of the caller's own, where launches may overlap on several streams.
    """
    one = m if isinstance(m, Tensor) else m[-1]
    if path is None:
        path, _ = choose_path(one, weights, scales)
    launches[path] += 1
    if path is HeadsPath.BATCHED:
        whole = m if isinstance(m, Tensor) else torch.cat(tuple(m), dim=-1)
        return parallel_heads_batched(whole, weights, scales)

    from vllm_gumiho.kernels.parallel_heads.triton import parallel_heads_triton

    on_cpu = one.device.type == "cpu"
    device = device_of(one.device)
    if path is not HeadsPath.FUSED:
        counters = None
    elif counters is None:
        counters = _counters(one.device)
    heads, hidden = weights.first_bias.shape
    rest, last = _heads_inputs(m, hidden)
    parts = []
    for rows, last_rows in zip(rest.split(MAX_BATCH), last.split(MAX_BATCH), strict=True):
        sizes = weights.weight.element_size(), last.element_size()
        tiling = choose_tiling(last_rows.shape[0], heads, hidden, *sizes, device)
        if on_cpu and path is HeadsPath.FUSED:
            tiling = replace(tiling, programs=1)
        parts.append(
            parallel_heads_triton(rows, last_rows, weights, scales, tiling, counters, path is HeadsPath.DEPENDENT)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
