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

from vllm_gumiho.drafters.eight_bit import EightBitMatrix
from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.kernels.eight_bit import MAX_ROWS, quantise_rows
from vllm_gumiho.kernels.lm_head_argmax import (
    TopToken,
    lm_head_argmax,
    row_tile,
    top_of_logits,
    vocab_parallel_argmax,
)
from vllm_gumiho.kernels.lm_head_argmax.tiles import ROW_TILES


@dataclass(frozen=True)
class LmHeadShard:
    """The rows of an LM head that this rank has.

    weight ``[rows, H]``, of which the first ``size`` are the tokens from id ``first`` on; rows behind are padding.
    ranks: that share the vocabulary.  logits: the head's own, ``[N, H]`` -> ``[N, rows]``.  eight_bit: the matrix whose
    rows these are, where they are a copy in 8 bits; ``weight`` is then its codes.
    """

    weight: Tensor
    first: int
    size: int
    ranks: int
    logits: Callable[[Tensor], Tensor]
    eight_bit: EightBitMatrix | None = None

    @property
    def scale(self) -> Tensor | None:
        """Of 8-bit rows ``[rows]``, else None."""
        return None if self.eight_bit is None else self.eight_bit.scale

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
    if (shard.eight_bit is None and weight.dtype != dtype) or weight.stride(-1) != 1:
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
        if self.shard.ranks == 1:
            return self.top(hidden_states).ids
        return vocab_parallel_argmax(self.top, hidden_states, self.shard.size, self._gather).ids

    def top(self, hidden_states: Tensor) -> TopToken:
        """Of this rank's tokens, of which there is one at least."""
        shard, kernel = self.shard, row_tile(hidden_states.shape[0]) in self.tiles
        offset = shard.first if shard.ranks > 1 else 0
        if shard.eight_bit is not None and not kernel:
            return top_of_logits(shard.logits(hidden_states)[:, : shard.size], offset)
        return lm_head_argmax(hidden_states, shard.weight, shard.size, offset, kernel=kernel, scale=shard.scale)

    def _gather(self, pairs: Tensor) -> Tensor:
        return tensor_model_parallel_all_gather(pairs, dim=0).view(self.shard.ranks, *pairs.shape)


class EightBitHead(nn.Module):
    """A copy in 8 bits of this rank's rows of the target's LM head, to draft by.

    vLLM's logits processor takes it in the LM head's place: it asks for what is copied here.  For more rows than one
    launch of our product takes, the target's own rows are read: a second launch would read as many bytes as they have.

    lm_head: one for which `plain_head_problem` has none.
    """

    def __init__(self, lm_head: Any, dtype: torch.dtype):
        super().__init__()
        self.matrix = EightBitMatrix(quantise_rows(lm_head.weight.data, dtype))
        self.tp_size, self.shard_indices = lm_head.tp_size, lm_head.shard_indices
        self.quant_method = _MatrixMethod()
        self._wide = lambda x: lm_head.quant_method.apply(lm_head, x, bias=None)

    def logits(self, x: Tensor) -> Tensor:
        """``[N, H]`` -> ``[N, rows]``."""
        return self._wide(x) if x.shape[0] > MAX_ROWS and not self.matrix.packed else self.matrix(x)

    def shard(self, vocab_size: int) -> LmHeadShard:
        """As `LmHeadShard.of` has it."""
        places, matrix = self.shard_indices, self.matrix
        first = places.org_vocab_start_index
        size = max(0, min(places.org_vocab_end_index, vocab_size) - first)
        return LmHeadShard(matrix.weight, first, size, self.tp_size, self.logits, matrix)


class _MatrixMethod:
    """Stands where vLLM's LM heads have their quantisation method."""

    def apply(self, layer: EightBitHead, x: Tensor, bias: Tensor | None = None) -> Tensor:
        assert bias is None, "an LM head with a bias is not copied"
        return layer.logits(x)


class DraftHead(nn.Module):
    """The LM head's rows of a draft vocabulary, whole on every rank.

    ids ``[Vd]`` int64, ascending; ``weight [Vd, H]`` in the LM head's dtype, or ``matrix`` of 8-bit rows.  Tensors are
    buffers: vLLM's sleep keeps those alone.

    Raises: CheckpointError where the target's LM head has no plain rows to take.
    """

    ids: Tensor
    weight: Tensor

    def __init__(self, lm_head: Any, ids: Tensor, checkpoint: str, dtype: torch.dtype | None = None):
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
        self.matrix = None if dtype is None else EightBitMatrix(quantise_rows(whole, dtype))
        if dtype is None:
            self.register_buffer("weight", whole, persistent=False)

    @property
    def shard(self) -> LmHeadShard:
        """All of it."""
        weight = self.weight if self.matrix is None else self.matrix.weight
        return LmHeadShard(weight, 0, self.ids.shape[0], 1, self.draft_logits, self.matrix)

    def draft_logits(self, hidden_states: Tensor) -> Tensor:
        """``[N, H]`` -> ``[N, Vd]``."""
        if self.matrix is not None:
            return self.matrix(hidden_states)
        return F.linear(hidden_states.to(self.weight.dtype), self.weight)

    def spread(self, some: Tensor, vocab_size: int) -> Tensor:
        """Logits ``[N, Vd]`` -> ``[N, V]``, minus infinity for what is never drafted."""
        return some.new_full((some.shape[0], vocab_size), -torch.inf).index_copy_(1, self.ids, some)
