"""Mixture of Attentions drafting in vLLM's model runner V1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vllm_gumiho.runners.v1 import DraftProposer


class MoaProposer(DraftProposer):
    """Chains through `EagleProposer.propose`, the features of newly verified tokens cached before the first pass.

    The passes read them and write none; where a draft's sequence ends in each pass, the attention's own metadata says
    (`vllm_gumiho.drafters.moa.context`).
    """

    def load_model(self, target_model: nn.Module) -> None:
        """As the base class; the drafter learns which target it reads."""
        super().load_model(target_model)
        self.model.read_target(target_model)

    def _draft(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> Tensor:
        """As the base class, after states of several layers side by side have become features."""
        states = self._split(kwargs.pop("target_hidden_states"))
        features = self.model.features_of(states, kwargs["target_positions"])
        return super()._draft(num_speculative_tokens, *args, target_hidden_states=features, **kwargs)

    def set_inputs_first_pass(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class; the features of the batch's rows go into the cross-attention's cache."""
        rows, sampled, common = super().set_inputs_first_pass(*args, **kwargs)
        self.model.write_features(self.hidden_states[:rows], self.positions[:rows], common.slot_mapping[:rows])
        return rows, sampled, common

    def dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """As much memory as a draft of the largest batch takes: the layers' states to features, then the passes."""
        self._dummy_features(num_tokens)
        super().dummy_run(num_tokens, *args, **kwargs)

    @torch.inference_mode()
    def _dummy_features(self, rows: int) -> Tensor:
        states = self.hidden_states.new_zeros(rows, self.model.num_states * self.hidden_size)
        return self.model.features_of(self._split(states), self.positions.new_zeros(rows))

    def _split(self, states: Tensor) -> tuple[Tensor, ...]:
        """``[N, m * H]`` -> m of ``[N, H]``."""
        return states.unflatten(-1, (self.model.num_states, -1)).unbind(1)
