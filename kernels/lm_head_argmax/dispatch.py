"""The LM head's argmax by the Triton kernel where there is a device for it, else by the reference."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from vllm_gumiho.kernels.lm_head_argmax.reference import TopToken, lm_head_argmax_reference
from vllm_gumiho.kernels.parallel_heads.dispatch import interpreting

launches: Counter[str] = Counter()
"""Calls so far: ``triton`` and ``reference``; a replayed CUDA graph counts once, at its capture."""


def lm_head_argmax(rows: Tensor, weight: Tensor, vocab_size: int | None = None, index_offset: int = 0) -> TopToken:
    """rows ``[R, H]`` x weight ``[V, H]`` of one dtype -> ids ``[R]`` int64 and top logits ``[R]`` float32.

    vocab_size: rows of weight that are real tokens; padding behind them never wins.  A shard of a vocabulary that is
    split over devices gives its first token as ``index_offset`` and hands the results to `reduce_shards`.
    """
    size = weight.shape[0] if vocab_size is None else min(vocab_size, weight.shape[0])
    if size < 1:
        raise ValueError("the argmax of an empty vocabulary has no answer")
    runs = rows.device.type == "cuda" or (rows.device.type == "cpu" and interpreting())
    kernel = runs and rows.dtype == weight.dtype and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
    launches["triton" if kernel else "reference"] += 1
    if not kernel:
        return lm_head_argmax_reference(rows, weight, size, index_offset)

    from vllm_gumiho.kernels.lm_head_argmax.triton import lm_head_argmax_triton

    return lm_head_argmax_triton(rows, weight, size, index_offset)
