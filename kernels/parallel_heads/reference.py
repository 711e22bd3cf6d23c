"""Plain torch definition of the parallel heads: the ground truth for every other version.

Source: Gumiho (arXiv 2503.10135) Table 5 and its reference code.  With m = cat[o_1, ..., o_S]:

    z = SiLU(W[i,0] m + b[i,0])                 S*H -> H, no residual
    z = z + SiLU(W[i,j] z + b[i,j]), j = 1..5   H -> H
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_STAGES = 6
GAVE_UP = HEAD_STAGES - 1
"""Place, behind the five of the barriers, of the counter that stays set once a wait has given up."""
SPACING = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Error of one stored z as a share of the largest: the spacing of the numbers around 1, as Triton's interpreter
truncates to bfloat16.  float32: the sums' order instead, eight roundings being ample for K up to 3072."""


class HeadWeights(NamedTuple):
    """Weights of n heads, stacked; W maps x to ``W x`` as in ``nn.Linear``."""

    first_weight: Tensor  # [n, H, S*H]
    first_bias: Tensor  # [n, H]
    weight: Tensor  # [n, 5, H, H]
    bias: Tensor  # [n, 5, H]

    def take(self, count: int) -> HeadWeights:
        """The first ``count`` heads, as views."""
        return HeadWeights(*(t[:count] for t in self))


class HeadScales(NamedTuple):
    """Row scales of 8-bit `HeadWeights`: row r of the matrix is ``scale[r] * weight[r]``."""

    first: Tensor  # [n, H] float32
    rest: Tensor  # [n, 5, H] float32

    def take(self, count: int) -> HeadScales:
        """The scales of the first ``count`` heads, as views."""
        return HeadScales(*(t[:count] for t in self))


def parallel_heads_reference(m: Tensor, weights: HeadWeights, scales: HeadScales | None = None) -> Tensor:
    """``m [B, S*H]`` -> ``z [n, B, H]`` in m's dtype, computed head by head in float32."""

    def wide(weight: Tensor, scale: Tensor | None) -> Tensor:
        return weight.float() if scale is None else weight.float() * scale[:, None]

    out = m.new_empty(weights.first_weight.shape[0], m.shape[0], weights.first_weight.shape[1])
    for i, z in enumerate(out):
        x = F.silu(
            F.linear(
                m.float(), wide(weights.first_weight[i], scales and scales.first[i]), weights.first_bias[i].float()
            )
        )
        for j in range(HEAD_STAGES - 1):
            x = x + F.silu(
                F.linear(x, wide(weights.weight[i, j], scales and scales.rest[i, j]), weights.bias[i, j].float())
            )
        z.copy_(x)
    return out
