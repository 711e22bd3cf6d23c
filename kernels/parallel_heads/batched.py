"""The parallel heads as six batched matrix products, all heads in each: library kernels, any device and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_gumiho.kernels.eight_bit.reference import EightBitRows, dequantise_rows
from vllm_gumiho.kernels.parallel_heads.reference import HEAD_STAGES, HeadScales, HeadWeights


def parallel_heads_batched(m: Tensor, weights: HeadWeights, scales: HeadScales | None = None) -> Tensor:
    """``m [B, S*H]`` -> ``z [n, B, H]`` in the biases' dtype.  Same definition as `parallel_heads_reference`.

    8-bit weights are widened a stage at a time, at each call.
    """

    def wide(weight: Tensor, scale: Tensor | None) -> Tensor:
        rows = weight if scale is None else dequantise_rows(EightBitRows(weight, scale), weights.bias.dtype)
        return rows.transpose(1, 2)

    count = weights.first_weight.shape[0]
    x = m.expand(count, -1, -1)
    first = wide(weights.first_weight, None if scales is None else scales.first)
    z = F.silu(torch.baddbmm(weights.first_bias[:, None], x, first))
    for j in range(HEAD_STAGES - 1):
        stage = wide(weights.weight[:, j], None if scales is None else scales.rest[:, j])
        z = z + F.silu(torch.baddbmm(weights.bias[:, j, None], z, stage))
    return z
