"""The LM head's argmax by the Triton kernel where there is a device for it, else by the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from vllm_gumiho.kernels.device import interpreting
from vllm_gumiho.kernels.eight_bit.reference import EightBitRows, dequantise_rows, is_eight_bit
from vllm_gumiho.kernels.lm_head_argmax.reference import (
    TopToken,
    lm_head_argmax_logits,
    lm_head_argmax_reference,
    pack_pairs,
    reduce_pairs,
)
from vllm_gumiho.kernels.lm_head_argmax.tiles import MAX_ROWS

launches: Counter[str] = Counter()
"""Calls so far: ``triton``, ``logits`` and ``reference``; a replayed CUDA graph counts once, at its capture."""


def lm_head_argmax(
    rows: Tensor,
    weight: Tensor,
    vocab_size: int | None = None,
    index_offset: int = 0,
    kernel: bool = True,
    scale: Tensor | None = None,
) -> TopToken:
    """rows ``[R, H]`` x weight ``[V, H]`` of one dtype -> ids ``[R]`` int64 and top logits ``[R]`` float32.

    scale ``[V]`` float32: with 8-bit weights, and only with them.

    vocab_size: rows of weight that are real tokens; padding behind them never wins.  A shard of a vocabulary that is
    split over devices gives its first token as ``index_offset``; `vocab_parallel_argmax` does that and the rest.
    kernel: false for logits by the library, as above `MAX_ROWS` rows.
    """
    size = weight.shape[0] if vocab_size is None else min(vocab_size, weight.shape[0])
    if size < 1:
        raise ValueError("the argmax of an empty vocabulary has no answer")
    runs = rows.device.type == "cuda" or (rows.device.type == "cpu" and interpreting())
    fits = rows.dtype == weight.dtype if scale is None else is_eight_bit(weight.dtype)
    if not runs or not fits or rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        launches["reference"] += 1
        return lm_head_argmax_reference(rows, _wide(weight, scale, torch.float32), size, index_offset)
    if not kernel or rows.shape[0] > MAX_ROWS:
        launches["logits"] += 1
        return lm_head_argmax_logits(rows, _wide(weight, scale, rows.dtype), size, index_offset)
    launches["triton"] += 1

    from vllm_gumiho.kernels.lm_head_argmax.triton import lm_head_argmax_triton

    return lm_head_argmax_triton(rows, weight, size, index_offset, scale=scale)


def _wide(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return weight if scale is None else dequantise_rows(EightBitRows(weight, scale), dtype)


def vocab_parallel_argmax(
    local: Callable[[Tensor], TopToken], rows: Tensor, vocab_size: int, gather: Callable[[Tensor], Tensor]
) -> TopToken:
    """The top tokens ``[R]`` over a vocabulary whose LM head is split over P ranks; every rank gets them all.

    local: rows ``[R, H]`` -> the top of this rank's ``vocab_size`` tokens, by their ids in the whole vocabulary; not
    asked where there are none.  gather: ``[R, 2]`` float32 of each rank -> ``[P, R, 2]``; no more is sent.
    """
    if vocab_size > 0:
        top = local(rows)
    else:  # padding only: loses even among logits of -inf, as its id is the highest
        ids = rows.new_full((rows.shape[0],), torch.iinfo(torch.int32).max, dtype=torch.int64)
        top = TopToken(ids, rows.new_full(ids.shape, -torch.inf, dtype=torch.float32))
    return reduce_pairs(gather(pack_pairs(top)))
