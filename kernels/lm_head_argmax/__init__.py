"""Greedy tokens from rows of hidden states: ``[R, H]`` x LM head ``[V, H]`` -> ids ``[R]``, no logits written."""

from vllm_gumiho.kernels.lm_head_argmax.dispatch import launches, lm_head_argmax, vocab_parallel_argmax
from vllm_gumiho.kernels.lm_head_argmax.reference import (
    TopToken,
    lm_head_argmax_reference,
    pack_pairs,
    reduce_pairs,
    reduce_shards,
)

__all__ = [
    "TopToken",
    "launches",
    "lm_head_argmax",
    "lm_head_argmax_reference",
    "pack_pairs",
    "reduce_pairs",
    "reduce_shards",
    "vocab_parallel_argmax",
]
