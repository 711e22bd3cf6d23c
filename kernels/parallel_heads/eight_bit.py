"""8-bit head weights: float8 e4m3 or int8 with one float32 scale per output row."""

from __future__ import annotations

import torch

from vllm_gumiho.kernels.eight_bit.reference import EightBitRows, dequantise_rows, quantise_rows
from vllm_gumiho.kernels.parallel_heads.reference import HeadScales, HeadWeights


def quantize_heads(weights: HeadWeights, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[HeadWeights, HeadScales]:
    """Weights to e4m3 or int8 with a scale per row; biases stay as they are."""
    first, rest = quantise_rows(weights.first_weight, dtype), quantise_rows(weights.weight, dtype)
    codes = HeadWeights(first.weight, weights.first_bias, rest.weight, weights.bias)
    return codes, HeadScales(first.scale, rest.scale)


def dequantize_heads(weights: HeadWeights, scales: HeadScales, dtype: torch.dtype) -> HeadWeights:
    """The full-precision weights that 8-bit ``weights`` stand for, in ``dtype``: a copy, for references and checks."""
    first = dequantise_rows(EightBitRows(weights.first_weight, scales.first), dtype)
    rest = dequantise_rows(EightBitRows(weights.weight, scales.rest), dtype)
    return HeadWeights(first, weights.first_bias.to(dtype), rest, weights.bias.to(dtype))
