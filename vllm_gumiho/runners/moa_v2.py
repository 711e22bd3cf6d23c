"""Mixture of Attentions drafting in vLLM's model runner V2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig

from vllm_gumiho.runners.v2 import DraftSpeculator


class MoaSpeculator(DraftSpeculator):
    """Chains through the base class; the features of newly verified tokens are cached before the first pass.

    Within `_prefill`, and so within its CUDA graph where it has one.  The lengths at which the attention to these
    features ends stay in ``verified_lens`` while the chain grows; its metadata, captured or not, reads them there.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        super().__init__(vllm_config, device)
        self.verified_lens = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)

    def load_model(self, target_model: nn.Module) -> None:
        """As the base class; the drafter learns which target it reads."""
        super().load_model(target_model)
        self.model.read_target(target_model)

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, Tensor],
        last_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As the base class, which takes features for what it drafts from; no copy of all states is made."""
        assert aux_hidden_states
        features = self.model.features_of(aux_hidden_states, input_batch.positions)
        return super().propose(input_batch, attn_metadata, slot_mappings, features, None, *args, **kwargs)

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        """As the base class; builders of metadata that ends at verified tokens learn where these lengths are."""
        super().set_attn(*args, **kwargs)
        for group in (group for groups in self.attn_groups for group in groups):
            for builder in group.metadata_builders:
                if hasattr(builder, "verified_lens"):
                    builder.verified_lens = self.verified_lens

    def on_multi_step_decode_begin(self, num_reqs: int) -> None:
        """The sequences have one drafted token now."""
        torch.sub(self.input_buffers.seq_lens, 1, out=self.verified_lens).clamp_(min=0)

    def _prefill(
        self,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        slots = (slot_mappings or {}).get(self.model.features_layer)
        if slots is not None:
            rows = slice(min(num_tokens, slots.shape[0]))
            self.model.write_features(self.hidden_states[rows], self.input_buffers.positions[rows], slots[rows])
        super()._prefill(num_reqs, num_tokens, attn_metadata, slot_mappings, *args, **kwargs)
