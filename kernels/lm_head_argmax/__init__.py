"""Greedy tokens from rows of hidden states: ``[R, H]`` x LM head ``[V, H]`` -> ids ``[R]``, no logits written."""

from vllm_gumiho.kernels.lm_head_argmax.dispatch import launches, lm_head_argmax, vocab_parallel_argmax
from vllm_gumiho.kernels.lm_head_argmax.reference import (
    TopToken,
    lm_head_argmax_logits,
    lm_head_argmax_reference,
    pack_pairs,
    reduce_pairs,
    reduce_shards,
    top_of_logits,
)
from vllm_gumiho.kernels.lm_head_argmax.tiles import MAX_ROWS, row_tile, row_tiles

__all__ = [
    "MAX_ROWS",
    "TopToken",
    "launches",
    "lm_head_argmax",
    "lm_head_argmax_logits",
    "lm_head_argmax_reference",
    "pack_pairs",
    "reduce_pairs",
    "reduce_shards",
    "row_tile",
    "row_tiles",
    "top_of_logits",
    "vocab_parallel_argmax",
]
