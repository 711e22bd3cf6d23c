"""LM heads as drafting reads them: a rank's shard, its argmax by the kernel, and a part of the vocabulary alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.kernels.lm_head_argmax import lm_head_argmax, row_tile, vocab_parallel_argmax
from vllm_gumiho.kernels.lm_head_argmax.tiles import ROW_TILES


@dataclass(frozen=True)
class LmHeadShard:
    """The rows of an LM head that this rank has.

    weight ``[rows, H]``, of which the first ``size`` are the tokens from id ``first`` on; rows behind are padding.
    ranks: that share the vocabulary.  logits: the head's own, ``[N, H]`` -> ``[N, rows]``.
    """

    weight: Tensor
    first: int
    size: int
    ranks: int
    logits: Callable[[Tensor], Tensor]

    @staticmethod
    def of(lm_head: Any, vocab_size: int) -> LmHeadShard:
        """Of a vocabulary-parallel LM head of vLLM's, for which `plain_head_problem` has none."""
        places = lm_head.shard_indices
        first = places.org_vocab_start_index
        size = max(0, min(places.org_vocab_end_index, vocab_size) - first)
        return LmHeadShard(
            lm_head.weight, first, size, lm_head.tp_size, lambda x: lm_head.quant_method.apply(lm_head, x, bias=None)
        )


def plain_head_problem(lm_head: Any) -> str | None:
    """Why an LM head's rows cannot be read as they lie, None where they can."""
    method = getattr(lm_head, "quant_method", None)
    plain = isinstance(method, (UnquantizedEmbeddingMethod, UnquantizedLinearMethod))
    if getattr(lm_head, "weight", None) is None or not plain:
        return f"the LM head is quantised or wrapped ({type(lm_head).__name__}, {type(method).__name__})"
    if getattr(lm_head, "bias", None) is not None:
        return "the LM head has a bias"
    if lm_head.shard_indices.num_added_elements:
        return "the LM head has added tokens"
    return None


def argmax_problem(shard: LmHeadShard, logit_scale: float, dtype: torch.dtype) -> str | None:
    """Why the argmax over this shard needs logits, None where the kernel applies.

    A positive scale moves no argmax, nor does a soft cap, which grows with the logit; at worst they tie two tokens that
    the kernel still tells apart.
    """
    weight = shard.weight
    if weight.dtype != dtype or weight.stride(-1) != 1:
        return f"no kernel for an LM head of {weight.dtype}, strides {weight.stride()}, with {dtype} features"
    if not logit_scale > 0:
        return f"logit_scale is {logit_scale}"
    return None


class GreedyArgmax:
    """Tokens of the largest logits, over all shards of an LM head.

    tiles: row tiles that the argmax kernel takes; for other numbers of rows each rank writes its own logits.
    """

    def __init__(self, shard: LmHeadShard, tiles: Collection[int] = ROW_TILES):
        self.shard = shard
        self.tiles = frozenset(tiles)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """``[N, H]`` -> ids ``[N]`` int64 within the LM head's vocabulary, the same on every rank."""
        shard, kernel = self.shard, row_tile(hidden_states.shape[0]) in self.tiles
        if shard.ranks == 1:
            return lm_head_argmax(hidden_states, shard.weight, shard.size, kernel=kernel).ids
        return vocab_parallel_argmax(
            hidden_states, shard.weight, shard.size, shard.first, self._gather, kernel=kernel
        ).ids

    def _gather(self, pairs: Tensor) -> Tensor:
        return tensor_model_parallel_all_gather(pairs, dim=0).view(self.shard.ranks, *pairs.shape)


class DraftHead(nn.Module):
    """The LM head's rows of a draft vocabulary, whole on every rank.

    ids ``[Vd]`` int64, ascending; ``weight [Vd, H]`` in the LM head's dtype.  Both are buffers: vLLM's sleep keeps
    those alone.

    Raises: CheckpointError where the target's LM head has no plain rows to take.
    """

    ids: Tensor
    weight: Tensor

    def __init__(self, lm_head: Any, ids: Tensor, checkpoint: str):
        super().__init__()
        if problem := plain_head_problem(lm_head):
            raise CheckpointError(
                f"{checkpoint}: has a reduced draft vocabulary, which needs an unquantised LM head without bias; "
                f"of this target, {problem}: use a drafter of the whole vocabulary"
            )
        weight, places = lm_head.weight, lm_head.shard_indices
        self.register_buffer("ids", ids.to(weight.device), persistent=False)
        mine = (self.ids >= places.org_vocab_start_index) & (self.ids < places.org_vocab_end_index)
        rows = weight.new_zeros(ids.shape[0], weight.shape[1])
        rows[mine] = weight[self.ids[mine] - places.org_vocab_start_index]
        whole = tensor_model_parallel_all_reduce(rows) if lm_head.tp_size > 1 else rows
        self.register_buffer("weight", whole, persistent=False)

    @property
    def shard(self) -> LmHeadShard:
        """All of it."""
        return LmHeadShard(self.weight, 0, self.weight.shape[0], 1, self.draft_logits)

    def draft_logits(self, hidden_states: Tensor) -> Tensor:
        """``[N, H]`` -> ``[N, Vd]``."""
        return F.linear(hidden_states.to(self.weight.dtype), self.weight)

    def spread(self, some: Tensor, vocab_size: int) -> Tensor:
        """Logits ``[N, Vd]`` -> ``[N, V]``, minus infinity for what is never drafted."""
        return some.new_full((some.shape[0], vocab_size), -torch.inf).index_copy_(1, self.ids, some)
