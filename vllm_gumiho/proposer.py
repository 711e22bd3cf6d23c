"""Gumiho drafting in vLLM's model runner V1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.eagle import EagleProposer

logger = init_logger("vllm.vllm_gumiho")


class GumihoProposer(EagleProposer):
    """Serial steps through `EagleProposer.propose`, then every head asked for in one batched computation.

    The base class samples once per serial step; `_sample_draft_tokens` keeps what each step drafted from, which is
    what the heads are fed.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = self.draft_model_config.hf_config
        self.num_serial_steps: int = config.num_serial_steps
        self._hidden: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._fused: list[Tensor] = []
        logger.info(
            "Gumiho drafts with %s: K=%d, model runner V1, heads by batched products",
            config.gumiho_checkpoint, self.num_speculative_tokens,
        )  # fmt: skip

    def _sample_draft_tokens(
        self, hidden_states: Tensor, sampling_metadata: SamplingMetadata
    ) -> tuple[Tensor, Tensor | None]:
        tokens, probs = super()._sample_draft_tokens(hidden_states, sampling_metadata)
        if self._hidden:
            # The pass that made these features fused (y, h) of the step before: o of that step.
            fused = self.model.fused[: hidden_states.shape[0]]
            self._fused.append(fused if self.num_serial_steps == 2 else fused.clone())
        self._hidden.append(hidden_states)
        self._tokens.append(tokens)
        return tokens, probs

    @torch.inference_mode()
    def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> Tensor:
        """Draft token ids ``[B, K]``, int64, for K = num_speculative_tokens; arguments as in the base class."""
        self._hidden, self._tokens, self._fused = [], [], []
        drafted = super().propose(min(num_speculative_tokens, self.num_serial_steps), *args, **kwargs)
        self.num_speculative_tokens = num_speculative_tokens
        num_heads = num_speculative_tokens - self.num_serial_steps
        if num_heads <= 0:
            return drafted

        self._fused.append(self.model.model.fuse(self._tokens[-1].int(), self._hidden[-1]))
        features = self.model.head_features(self._fused, num_heads)
        metadata = kwargs["sampling_metadata"]
        tokens, probs = super()._sample_draft_tokens(features, metadata)
        if probs is not None:
            serial_probs = self._last_draft_probs
            assert serial_probs is not None
            head_probs = probs.view(-1, num_heads, probs.shape[-1])
            self._last_draft_probs = torch.cat((serial_probs, head_probs), dim=1)
        return torch.cat((drafted, tokens.view(-1, num_heads)), dim=1)
