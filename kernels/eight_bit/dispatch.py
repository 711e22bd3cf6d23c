"""A product with 8-bit rows by the Triton kernel where there is a device for it, else by the reference."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from vllm_gumiho.kernels.device import interpreting
from vllm_gumiho.kernels.eight_bit.reference import EightBitRows, rows_linear_reference

MAX_ROWS = 64
"""Rows of x up to which the weights' bytes decide.  Above, the weights are widened once and the library multiplies."""

launches: Counter[str] = Counter()
"""Calls so far: ``triton`` and ``widened``; a replayed CUDA graph counts once, at its capture."""


def rows_linear(x: Tensor, rows: EightBitRows, bias: Tensor | None = None, kernel: bool = True) -> Tensor:
    """``x [B, K]`` x ``[N, K]`` 8-bit rows, + ``bias [N]`` -> ``[B, N]`` in x's dtype, summed in float32.

    kernel: false for the library's product of weights that are widened at each call.
    """
    runs = x.device.type == "cuda" or (x.device.type == "cpu" and interpreting())
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if not (kernel and runs and 0 < x.shape[0] <= MAX_ROWS and x.dtype in floats and x.stride(-1) == 1):
        launches["widened"] += 1
        return rows_linear_reference(x, rows, bias)
    launches["triton"] += 1

    from vllm_gumiho.kernels.eight_bit.triton import rows_linear_triton

    return rows_linear_triton(x, rows, bias)
