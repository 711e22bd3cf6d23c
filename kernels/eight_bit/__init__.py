"""Matrices of 8-bit rows: float8 e4m3 or int8 with one float32 scale a row, ``[N, K]`` x ``x [B, K]`` -> ``[B, N]``."""

from vllm_gumiho.kernels.eight_bit.dispatch import MAX_ROWS, launches, rows_linear
from vllm_gumiho.kernels.eight_bit.reference import (
    EIGHT_BIT,
    EightBitRows,
    as_fnuz,
    dequantise_rows,
    is_eight_bit,
    quantise_rows,
    rows_linear_reference,
)

__all__ = [
    "EIGHT_BIT",
    "MAX_ROWS",
    "EightBitRows",
    "as_fnuz",
    "dequantise_rows",
    "is_eight_bit",
    "launches",
    "quantise_rows",
    "rows_linear",
    "rows_linear_reference",
]
