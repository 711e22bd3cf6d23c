"""The parallel MLP heads: ``m [B, S*H]`` -> ``z [n, B, H]``."""

from vllm_gumiho.kernels.parallel_heads.batched import parallel_heads_batched
from vllm_gumiho.kernels.parallel_heads.dispatch import (
    HeadsPath,
    choose_path,
    launches,
    new_counters,
    offered_paths,
    parallel_heads,
)
from vllm_gumiho.kernels.parallel_heads.eight_bit import HeadScales, dequantize_heads, quantize_heads
from vllm_gumiho.kernels.parallel_heads.reference import (
    GAVE_UP,
    HEAD_STAGES,
    SPACING,
    HeadWeights,
    parallel_heads_reference,
)

__all__ = [
    "GAVE_UP",
    "HEAD_STAGES",
    "SPACING",
    "HeadScales",
    "HeadWeights",
    "HeadsPath",
    "choose_path",
    "dequantize_heads",
    "launches",
    "new_counters",
    "offered_paths",
    "parallel_heads",
    "parallel_heads_batched",
    "parallel_heads_reference",
    "quantize_heads",
]
