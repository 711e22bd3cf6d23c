"""Plain torch definition of the LM head's argmax, the ground truth for the kernel; and the library's way.

    logit[r, v] = sum over h of rows[r, h] * weight[v, h]      v < vocab_size
    id[r] = index_offset + the lowest v with the largest logit[r, v]

A NaN logit counts as +inf: it wins, as it does in ``torch.argmax``, and the id stays a valid token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TopToken(NamedTuple):
    """The best token of each row."""

    ids: Tensor  # [R] int64
    logits: Tensor  # [R] float32


def lm_head_argmax_reference(
    rows: Tensor, weight: Tensor, vocab_size: int | None = None, index_offset: int = 0
) -> TopToken:
    """rows ``[R, H]``, weight ``[V, H]``: the top token among the first ``vocab_size`` rows of weight, in float32."""
    logits = rows.float() @ weight[:vocab_size].float().T
    logits = logits.masked_fill(logits.isnan(), torch.inf)
    ids = logits.argmax(dim=-1)
    return TopToken(ids + index_offset, logits.gather(1, ids[:, None])[:, 0])


def lm_head_argmax_logits(
    rows: Tensor, weight: Tensor, vocab_size: int | None = None, index_offset: int = 0
) -> TopToken:
    """The same from logits of the library's product, which are rounded to the rows' dtype: ties may fall otherwise."""
    return top_of_logits(rows @ weight[:vocab_size].T, index_offset)


def top_of_logits(logits: Tensor, index_offset: int = 0) -> TopToken:
    """``[R, V]`` logits -> the top token of each row; a NaN counts as +inf."""
    top = logits.max(dim=-1)
    values = top.values.float()
    return TopToken(top.indices + index_offset, values.masked_fill(values.isnan(), torch.inf))


def reduce_shards(ids: Tensor, logits: Tensor) -> TopToken:
    """``[P, R]`` tokens of P vocabulary shards -> the best of each row; equal logits go to the lowest id."""
    top = logits.amax(dim=0)
    return TopToken(ids.masked_fill(logits != top, torch.iinfo(ids.dtype).max).amin(dim=0), top)


def pack_pairs(top: TopToken) -> Tensor:
    """``[R, 2]`` float32, the logit and the bits of the id: one collective sends both, and an id stays exact."""
    return torch.stack((top.logits, top.ids.to(torch.int32).view(torch.float32)), dim=-1)


def reduce_pairs(pairs: Tensor) -> TopToken:
    """`pack_pairs` of P vocabulary shards, ``[P, R, 2]`` -> the best of each row, as `reduce_shards`."""
    return reduce_shards(pairs[..., 1].contiguous().view(torch.int32).long(), pairs[..., 0])
