"""The parallel heads by the fastest path that the device, the dtypes and the batch allow."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from enum import Enum

import torch
from torch import Tensor

from vllm_gumiho.kernels.parallel_heads.batched import parallel_heads_batched
from vllm_gumiho.kernels.parallel_heads.fp8 import HeadScales, dequantize_heads
from vllm_gumiho.kernels.parallel_heads.reference import HEAD_STAGES, HeadWeights
from vllm_gumiho.kernels.parallel_heads.tiling import MAX_BATCH, Device, choose_tiling


class HeadsPath(str, Enum):
    """How the heads are computed."""

    FUSED = "one Triton launch"
    STAGES = "one Triton launch per stage"
    BATCHED = "batched matrix products"


launches: Counter[HeadsPath] = Counter()
"""Calls so far by path; a replayed CUDA graph counts once, at its capture."""


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    try:
        import triton
    except ImportError:
        return False
    # Triton reads the switch once for its own library, at import; setting it later gives a broken mixture.
    return bool(triton.knobs.runtime.interpret) and not isinstance(triton.language.max, triton.JITFunction)


@functools.cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    per_processor = properties.shared_memory_per_multiprocessor
    per_program = getattr(properties, "shared_memory_per_block_optin", per_processor)
    native = torch.version.hip is not None or (properties.major, properties.minor) >= (8, 9)
    return Device(properties.multi_processor_count, per_processor, per_program or per_processor, native)


# In place of a GPU under the interpreter: few programs, so that each gets several tiles.
_INTERPRETED = Device(processors=2, shared_per_processor=228 << 10, shared_per_program=227 << 10)


def choose_path(m: Tensor, weights: HeadWeights, scales: HeadScales | None = None) -> tuple[HeadsPath, str]:
    """The path for inputs like these, and why.  Reads shapes, dtypes and devices only."""
    batch, hidden = m.shape[0], weights.weight.shape[-1]
    if m.device.type == "cpu" and not interpreting():
        return HeadsPath.BATCHED, "the heads are on the CPU"
    if m.device.type not in ("cpu", "cuda"):
        return HeadsPath.BATCHED, f"no Triton kernel for device type {m.device.type}"
    if m.dtype not in (torch.float32, torch.bfloat16, torch.float16) or hidden % 16:
        return HeadsPath.BATCHED, f"no Triton kernel for {m.dtype} and H={hidden}"
    if weights.weight.dtype != (m.dtype if scales is None else torch.float8_e4m3fn):
        return HeadsPath.BATCHED, f"no Triton kernel for {weights.weight.dtype} weights and {m.dtype} inputs"
    if batch > MAX_BATCH and scales is None:
        return HeadsPath.BATCHED, f"batch {batch} is above {MAX_BATCH}"
    if m.device.type == "cpu":
        return HeadsPath.STAGES, "Triton's interpreter runs programs one after the other, so none may wait"
    if torch.version.hip is not None:
        # The barrier of a workgroup's threads waits for shared memory only there, not for global stores.
        return HeadsPath.STAGES, "the barrier inside the launch is built for NVIDIA devices"
    return HeadsPath.FUSED, f"batch {batch} fits one launch"


_kept_counters: dict[torch.device, Tensor] = {}


def new_counters(device: torch.device) -> Tensor:
    """Barrier counters ``[6]`` int32, zero; every launch leaves them zero again.

    Two launches that may run at the same time need two sets.
    """
    return torch.zeros(HEAD_STAGES, dtype=torch.int32, device=device)


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
    m: Tensor,
    weights: HeadWeights,
    scales: HeadScales | None = None,
    path: HeadsPath | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """``m [B, S*H]`` -> ``z [n, B, H]`` in m's dtype; every path follows `parallel_heads_reference`.

    scales: with float8 weights, and only with them.  path: None for the one `choose_path` names.
    counters: `new_counters` of the caller's own, where launches may overlap on several streams.
    """
    if path is None:
        path, _ = choose_path(m, weights, scales)
    launches[path] += 1
    if path is HeadsPath.BATCHED:
        return parallel_heads_batched(m, weights if scales is None else dequantize_heads(weights, scales, m.dtype))

    from vllm_gumiho.kernels.parallel_heads.triton import parallel_heads_triton

    on_cpu = m.device.type == "cpu"
    device = _INTERPRETED if on_cpu else _device(m.device.index or 0)
    if path is not HeadsPath.FUSED:
        counters = None
    elif counters is None:
        counters = _counters(m.device)
    heads, hidden = weights.first_bias.shape
    parts = []
    for rows in m.contiguous().split(MAX_BATCH):
        tiling = choose_tiling(rows.shape[0], heads, hidden, weights.weight.element_size(), m.element_size(), device)
        if on_cpu and path is HeadsPath.FUSED:
            tiling = replace(tiling, programs=1)
        parts.append(parallel_heads_triton(rows, weights, scales, tiling, counters))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
