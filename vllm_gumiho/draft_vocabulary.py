"""Drafting over a part of the target's vocabulary: fewer LM head rows to read, any token still verified."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_gumiho.checkpoint import D2T, CheckpointError


def target_ids(d2t: Tensor, vocab_size: int, checkpoint: str) -> Tensor:
    """Target token ids of the draft tokens, ``[Vd]`` int64, from their offsets.

    Raises: CheckpointError for ids that repeat, fall, or lie outside the target's vocabulary.
    """
    ids = torch.arange(d2t.shape[0]) + d2t.to("cpu", torch.int64)
    if ids[0] < 0 or ids[-1] >= vocab_size or not (ids[1:] > ids[:-1]).all():
        raise CheckpointError(
            f"{checkpoint}: {D2T} does not name rising token ids of a vocabulary of {vocab_size}; "
            "it belongs to another target, or the file is damaged"
        )
    return ids


class _Rows(UnquantizedLinearMethod):
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.weight, bias)


class DraftHead(nn.Module):
    """The LM head's rows of the draft vocabulary, whole on every rank.

    ids ``[Vd]`` int64, ascending; ``weight [Vd, H]`` in the LM head's dtype.

    Raises: CheckpointError where the target's LM head has no plain rows to take.
    """

    def __init__(self, lm_head: Any, ids: Tensor, checkpoint: str):
        super().__init__()
        weight = getattr(lm_head, "weight", None)
        if weight is None or not weight.is_floating_point() or getattr(lm_head, "bias", None) is not None:
            raise CheckpointError(
                f"{checkpoint}: has a reduced draft vocabulary, which needs an unquantised LM head without bias; "
                "this target's is not, use a head of the whole vocabulary"
            )
        shard = lm_head.shard_indices
        self.ids = ids.to(weight.device)
        mine = (self.ids >= shard.org_vocab_start_index) & (self.ids < shard.org_vocab_end_index)
        rows = weight.new_zeros(ids.shape[0], weight.shape[1])
        rows[mine] = weight[self.ids[mine] - shard.org_vocab_start_index]
        self.weight = tensor_model_parallel_all_reduce(rows) if lm_head.tp_size > 1 else rows
        self.quant_method = _Rows()
        self.tp_size = 1
        self.shard_indices = SimpleNamespace(
            org_vocab_start_index=0, org_vocab_end_index=ids.shape[0], num_added_elements=0
        )

    def logits(self, hidden_states: Tensor, vocab_size: int) -> Tensor:
        """``[N, H]`` -> ``[N, V]``, minus infinity for what is never drafted."""
        some = F.linear(hidden_states, self.weight)
        return some.new_full((some.shape[0], vocab_size), -torch.inf).index_copy_(1, self.ids, some)
