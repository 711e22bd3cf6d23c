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
from vllm_gumiho.drafters.kernel_choice import kernel_switch
from vllm_gumiho.drafters.lm_head import DraftHead, GreedyArgmax, LmHeadShard, argmax_problem, plain_head_problem
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

        Takes the draft vocabulary's rows, where there is one.
        """
        if self.draft_ids is not None:
            self.draft_head = DraftHead(self.lm_head, self.draft_ids, self.config.gumiho_checkpoint)
            self.draft_ids = None  # the head has them, on its device
        refused = None if self.draft_head else plain_head_problem(self.lm_head)
        if refused is not None:
            return None, refused
        shard = self.draft_head.shard if self.draft_head else LmHeadShard.of(self.lm_head, self.config.vocab_size)
        refused = argmax_problem(shard, self.logits_processor.scale, self.draft_dtype)
        return (None, refused) if refused else (GreedyArgmax(shard), None)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """``[N, H]`` -> ``[N, V]`` by the target's LM head, its bias included; -inf for tokens never drafted."""
        if self.draft_head is not None:
            logits, cap = self.draft_head.draft_logits(hidden_states), self.logits_processor.soft_cap
            if cap is not None:
                logits = torch.tanh(logits / cap) * cap
            return self.draft_head.spread(logits * self.logits_processor.scale, self.config.vocab_size)
        return self.logits_processor(self.lm_head, hidden_states, getattr(self.lm_head, "bias", None))

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
        bias = getattr(self.lm_head, "bias", None)
        return self.logits_processor.get_top_tokens(self.lm_head, hidden_states, bias)
