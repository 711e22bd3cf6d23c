"""A product with 8-bit rows by the Triton kernel where there is a device for it, else by the reference."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from vllm_gumiho.kernels.device import interpreting
from vllm_gumiho.kernels.eight_bit.reference import EightBitRows, rows_linear_reference

MAX_ROWS = 64
"""Rows of x in a launch: up to these the weights' bytes decide."""
MAX_LAUNCHES = 16
"""For one product.  Each reads a byte a code; widening moves 21 of them (by way of float32), whatever the rows are."""

launches: Counter[str] = Counter()
"""Products so far: ``triton`` and ``widened``; a replayed CUDA graph counts once, at its capture."""


def rows_linear(x: Tensor, rows: EightBitRows, bias: Tensor | None = None, kernel: bool = True) -> Tensor:
    """``x [B, K]`` x ``[N, K]`` 8-bit rows, + ``bias [N]`` -> ``[B, N]`` in x's dtype, summed in float32.

    kernel: false for the library's product of weights that are widened at each call, as above `MAX_LAUNCHES` launches.
    """
    runs = x.device.type == "cuda" or (x.device.type == "cpu" and interpreting())
    floats = (torch.float32, torch.bfloat16, torch.float16)
    most = MAX_LAUNCHES * MAX_ROWS
    if not (kernel and runs and 0 < x.shape[0] <= most and x.dtype in floats and x.stride(-1) == 1):
        launches["widened"] += 1
        return rows_linear_reference(x, rows, bias)
    launches["triton"] += 1

    from vllm_gumiho.kernels.eight_bit.triton import rows_linear_triton

    parts = [rows_linear_triton(part, rows, bias) for part in x.split(MAX_ROWS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
