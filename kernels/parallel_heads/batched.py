"""The parallel heads as six batched matrix products, all heads in each: library kernels, any device and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_gumiho.kernels.parallel_heads.reference import HEAD_STAGES, HeadWeights


def parallel_heads_batched(m: Tensor, weights: HeadWeights) -> Tensor:
    """``m [B, S*H]`` -> ``z [n, B, H]`` in the weights' dtype.  Same definition as `parallel_heads_reference`."""
    count = weights.first_weight.shape[0]
    x = m.expand(count, -1, -1)
    z = F.silu(torch.baddbmm(weights.first_bias[:, None], x, weights.first_weight.transpose(1, 2)))
    for j in range(HEAD_STAGES - 1):
        z = z + F.silu(torch.baddbmm(weights.bias[:, j, None], z, weights.weight[:, j].transpose(1, 2)))
    return z
