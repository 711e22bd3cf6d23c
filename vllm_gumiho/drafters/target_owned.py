"""What a draft model borrows from its target: the embedding and the LM head, and the tokens that come from the latter.

vLLM's EAGLE loading puts the target's own modules in place after the draft's weights are loaded.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from vllm_gumiho.checkpoint.tensors import target_ids
from vllm_gumiho.drafters.draft_weights import DraftWeights
from vllm_gumiho.drafters.eight_bit import EightBitMatrix
from vllm_gumiho.drafters.kernel_choice import kernel_switch
from vllm_gumiho.drafters.lm_head import (
    DraftHead,
    EightBitHead,
    GreedyArgmax,
    LmHeadShard,
    argmax_problem,
    plain_head_problem,
)
from vllm_gumiho.drafters.target_view import language_model
from vllm_gumiho.errors import DraftModelError


def draft_lengths(speculative_config: Any) -> set[int]:
    """Every K that an engine can draft: the configured one, and those of a schedule."""
    schedule = speculative_config.num_speculative_tokens_per_batch_size or []
    return {speculative_config.num_speculative_tokens, *(length for _, _, length in schedule)}


def whole_attention(vllm_config: VllmConfig) -> VllmConfig:
    """The config for draft layers, which attend to all of a text: vLLM gives layers without a window the target's."""
    if vllm_config.cache_config.sliding_window is None:
        return vllm_config
    changed = copy.copy(vllm_config)
    changed.cache_config = copy.copy(vllm_config.cache_config)
    changed.cache_config.sliding_window = None
    return changed


class TargetOwned(nn.Module):
    """Stands where a module of the target will be put; has the weight's shape and no memory."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = torch.empty(*shape, device="meta")


class TargetHead:
    """Of a draft model: its logits and greedy tokens by the target's LM head, whole or a draft vocabulary's rows."""

    has_own_embed_tokens = False
    has_own_lm_head = False
    config: Any
    lm_head: Any

    def borrow_head(self, vllm_config: VllmConfig, config: Any) -> None:
        """Before weights are loaded; ``config`` is the draft's."""
        config.draft_vocab_size = config.vocab_size
        self.config = config
        self.lm_head = TargetOwned(config.vocab_size, config.hidden_size)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        kernel_switch()  # a wrong value ends the start here
        self.greedy_argmax: GreedyArgmax | None = None
        self.draft_ids: Tensor | None = None
        self.draft_head: DraftHead | None = None
        self.eight_bit_head: EightBitHead | None = None
        self.draft_weights = DraftWeights.of(config)
        speculative = vllm_config.speculative_config
        assert speculative is not None
        self.greedy_drafts = speculative.draft_sample_method != "probabilistic"
        self.max_batch = vllm_config.scheduler_config.max_num_seqs
        self.draft_lengths = draft_lengths(speculative)
        self.draft_dtype = vllm_config.model_config.dtype

    def take_logits(self, target: nn.Module) -> None:
        """Scale and soft cap of the target's logits, once it is loaded: drafts are drawn as it draws.

        Raises: DraftModelError where the target's LM head has not taken the place that is kept for it.
        """
        if isinstance(self.lm_head, TargetOwned):
            raise DraftModelError(
                f"vLLM has put no LM head of {type(target).__name__} in the draft's place for it; serve this target "
                "without speculation"
            )
        theirs = getattr(language_model(target), "logits_processor", None) or getattr(target, "logits_processor", None)
        theirs = getattr(theirs, "base_layer", theirs)
        self.logits_processor.scale = getattr(theirs, "scale", 1.0)
        self.logits_processor.soft_cap = getattr(theirs, "soft_cap", None)

    def take_draft_vocabulary(self, d2t: Tensor) -> None:
        """``d2t`` of the checkpoint."""
        self.draft_ids = target_ids(d2t, self.config.vocab_size, self.config.gumiho_checkpoint)

    def argmax_of_head(self) -> tuple[GreedyArgmax | None, str | None]:
        """The argmax kernel on the LM head, or why it does not apply, once the target's LM head is in place.

        Takes the draft vocabulary's rows, where there is one, and copies them in 8 bits, where that is asked for.
        """
        dtype = self.draft_weights.head_dtype
        if self.draft_ids is not None:
            self.draft_head = DraftHead(self.lm_head, self.draft_ids, self.config.gumiho_checkpoint, dtype)
            self.draft_ids = None  # the head has them, on its device
        refused = None if self.draft_head else plain_head_problem(self.lm_head)
        if refused is not None:
            return None, refused
        if self.draft_head is None and dtype is not None and self._head_is_drafts_dtype():
            self.eight_bit_head = EightBitHead(self.lm_head, dtype)
        if self.draft_head:
            shard = self.draft_head.shard
        elif self.eight_bit_head:
            shard = self.eight_bit_head.shard(self.config.vocab_size)
        else:
            shard = LmHeadShard.of(self.lm_head, self.config.vocab_size)
        refused = argmax_problem(shard, self.logits_processor.scale, self.draft_dtype)
        return (None, refused) if refused else (GreedyArgmax(shard), None)

    def _head_is_drafts_dtype(self) -> bool:
        """Whether vLLM computes logits in the engine's dtype: it takes nothing but plain weights for another."""
        return self.logits_processor.head_dtype in (None, self.draft_dtype)

    @property
    def head_matrix(self) -> EightBitMatrix | None:
        """The 8-bit rows that are drafted by."""
        if self.draft_head is not None:
            return self.draft_head.matrix
        return None if self.eight_bit_head is None else self.eight_bit_head.matrix

    def take_argmax(self, tokens: GreedyArgmax | None, tiles: frozenset[int]) -> None:
        """Find greedy tokens by the kernel at these row tiles; without any, by logits alone."""
        self.greedy_argmax = GreedyArgmax(tokens.shard, tiles) if tokens and tiles else None
        matrix = self.head_matrix
        if matrix is not None and self.greedy_argmax is None:
            matrix.pack(self.draft_dtype)

    def describe_head(self) -> str:
        """The LM head's copy, for the log; empty where there is none."""
        matrix = self.head_matrix
        if matrix is None:
            asked = self.draft_weights.head_dtype is not None
            return ", LM head as the target has it" if asked else ""
        return f", LM head in {self.draft_weights.lm_head} ({matrix.nbytes / 1e6:.2f} MB more)"

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """``[N, H]`` -> ``[N, V]`` by the target's LM head, its bias included; -inf for tokens never drafted."""
        if self.draft_head is not None:
            logits, cap = self.draft_head.draft_logits(hidden_states), self.logits_processor.soft_cap
            logits = logits.to(self.logits_processor.head_dtype or logits.dtype)  # as the runners' buffers are
            if cap is not None:
                logits = torch.tanh(logits / cap) * cap
            return self.draft_head.spread(logits * self.logits_processor.scale, self.config.vocab_size)
        head = self.eight_bit_head or self.lm_head
        return self.logits_processor(head, hidden_states, getattr(head, "bias", None))

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        """Greedy draft tokens of ``[N, H]``, ``[N]`` int64, the same on every rank: what vLLM's runners ask for.

        By the argmax kernel, which compares logits in float32 and writes none; over the draft vocabulary alone; or by
        each rank's best logit.
        """
        if self.draft_head is not None:
            if self.greedy_argmax is None:
                return self.draft_head.ids[self.draft_head.draft_logits(hidden_states).argmax(-1)]
            return self.draft_head.ids[self.greedy_argmax(hidden_states)]
        if self.greedy_argmax is not None:
            return self.greedy_argmax(hidden_states)
        if not self.logits_processor.scale > 0:  # vLLM refuses the best logit of each rank there
            logits = self.compute_logits(hidden_states)
            assert logits is not None
            return logits.argmax(-1)
        head = self.eight_bit_head or self.lm_head
        return self.logits_processor.get_top_tokens(head, hidden_states, getattr(head, "bias", None))
