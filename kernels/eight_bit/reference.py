"""Plain torch definition of 8-bit rows and of their product, the ground truth.

W[n, k] = scale[n] * code[n, k]        code: e4m3 or int8, scale: float32
y[b, n] = scale[n] * sum over k of x[b, k] * code[n, k]  +  bias[n]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EIGHT_BIT = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""Storage by the names that ``draft_weights`` has."""
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0, torch.int8: 127.0}


class EightBitRows(NamedTuple):
    """A matrix, or a stack of them."""

    weight: Tensor  # [..., N, K], e4m3 or int8
    scale: Tensor  # [..., N] float32


def is_eight_bit(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype go with a scale a row."""
    return dtype in _LARGEST


def quantise_rows(weight: Tensor, dtype: torch.dtype) -> EightBitRows:
    """``[..., N, K]`` floats -> rows of which each reaches the format's largest magnitude, one matrix at a time.

    The int8 codes are those that 8-bit checkpoints are written with.
    """
    codes = torch.empty_like(weight, dtype=dtype)
    scale = weight.new_empty(weight.shape[:-1], dtype=torch.float32)
    largest = _LARGEST[dtype]
    matrices = zip(
        weight.reshape(-1, *weight.shape[-2:]), codes.view(-1, *weight.shape[-2:]), scale.view(-1, weight.shape[-2]),
        strict=True,
    )  # fmt: skip
    for source, target, s in matrices:
        s.copy_(source.float().abs().amax(dim=-1).clamp_min(1e-12) / largest)
        exact = source.float() / s[:, None]
        target.copy_(exact.round() if dtype == torch.int8 else exact.clamp(-largest, largest))
    return EightBitRows(codes, scale)


def dequantise_rows(rows: EightBitRows, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that the rows stand for, a copy."""
    return (rows.weight.float() * rows.scale[..., None]).to(dtype)


def as_fnuz(rows: EightBitRows) -> EightBitRows:
    """e4m3fn -> e4m3fnuz, the format that gfx942 converts: the same bits are half the value there, bar minus zero."""
    bits = rows.weight.view(torch.int8)
    bits = torch.where(bits == -128, torch.zeros_like(bits), bits)  # NaN there
    return EightBitRows(bits.view(torch.float8_e4m3fnuz), 2 * rows.scale)


def rows_linear_reference(x: Tensor, rows: EightBitRows, bias: Tensor | None = None) -> Tensor:
    """``x [B, K]`` -> ``[B, N]`` in x's dtype; the weights are widened to that dtype."""
    return F.linear(x, dequantise_rows(rows, x.dtype), bias)
