"""8-bit head weights: float8 e4m3 with one float32 scale per output row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_gumiho.kernels.parallel_heads.reference import HeadWeights

E4M3_MAX = 448.0


class HeadScales(NamedTuple):
    """Row scales of 8-bit `HeadWeights`: row r of the matrix is ``scale[r] * weight[r]``."""

    first: Tensor  # [n, H] float32
    rest: Tensor  # [n, 5, H] float32

    def take(self, count: int) -> HeadScales:
        """The scales of the first ``count`` heads, as views."""
        return HeadScales(*(t[:count] for t in self))


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., H, K]`` -> e4m3 of the same shape and float32 scales ``[..., H]``, one matrix at a time."""
    quantized = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scale = weight.new_empty(weight.shape[:-1], dtype=torch.float32)
    for source, target, s in zip(weight.flatten(0, -3), quantized.flatten(0, -3), scale.flatten(0, -2), strict=True):
        row_max = source.float().abs().amax(dim=-1)
        s.copy_(torch.where(row_max > 0, row_max / E4M3_MAX, 1.0))
        target.copy_((source.float() / s[:, None]).clamp(-E4M3_MAX, E4M3_MAX))
    return quantized, scale


def quantize_heads(weights: HeadWeights) -> tuple[HeadWeights, HeadScales]:
    """Weights to float8 e4m3 with a scale per row; biases stay as they are."""
    first, first_scale = _quantize(weights.first_weight)
    rest, rest_scale = _quantize(weights.weight)
    return HeadWeights(first, weights.first_bias, rest, weights.bias), HeadScales(first_scale, rest_scale)


def dequantize_heads(weights: HeadWeights, scales: HeadScales, dtype: torch.dtype) -> HeadWeights:
    """The full-precision weights that 8-bit ``weights`` stand for, in ``dtype``: a copy, for references and checks."""
    first = (weights.first_weight.float() * scales.first[..., None]).to(dtype)
    rest = (weights.weight.float() * scales.rest[..., None]).to(dtype)
    return HeadWeights(first, weights.first_bias.to(dtype), rest, weights.bias.to(dtype))
