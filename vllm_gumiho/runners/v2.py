"""Gumiho drafting in vLLM's model runner V2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

from vllm_gumiho.drafters.gumiho import V2_SERIAL_STEPS as SERIAL_STEPS
from vllm_gumiho.runners import finish_loading, leave_single_launch, view_of, wants_same_seeded_text
from vllm_gumiho.runners.sample_and_walk import verify_by_walking


class DraftSpeculator(EagleSpeculator):
    """What every drafter of ours does in V2: says what drafts and how, and finds greedy tokens by its own model."""

    def load_model(self, target_model: nn.Module) -> None:
        """Load the drafter beside its target; says once what drafts and how."""
        super().load_model(view_of(target_model, self.vllm_config))
        if wants_same_seeded_text(self.vllm_config):
            verify_by_walking(target_model, self.vllm_config)
        # Greedy drafts come from the model's `get_top_tokens`; adaptive verification reads their logits too.
        self.use_local_argmax_reduction = self.acceptance_estimator is None
        finish_loading(self.model, target_model, self.vllm_config, "V2")


class GumihoSpeculator(DraftSpeculator):
    """Serial steps through the base class; the heads follow the second one inside the same (captured) function.

    vLLM records `_generate_fused_drafts` (or `_generate_draft`, for attention backends that cannot update their
    metadata in place) as one CUDA graph: serial decode step, heads, LM head and sampling are in it.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        super().__init__(vllm_config, device)
        self._hidden: Tensor | None = None
        self._draft_length = 0
        self._head_offsets = torch.arange(max(1, self.num_speculative_steps - SERIAL_STEPS), device=device)

    def propose(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the base class; without the captured graphs once their single launch of the heads has failed."""
        if leave_single_launch(self.model) and self.decode_cudagraph_manager is not None:
            self.decode_cudagraph_manager.release_graphs()
        return super().propose(*args, **kwargs)

    def _run_model(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._hidden, hidden = super()._run_model(*args, **kwargs)
        return self._hidden, hidden

    def _multi_step_decode(
        self,
        num_reqs: int,
        skip_attn: bool,
        batch_desc: BatchExecutionDescriptor,
        num_tokens_across_dp: Tensor | None,
        seq_lens_cpu_upper_bound: Tensor,
        num_speculative_steps: int,
    ) -> None:
        self._draft_length = num_speculative_steps
        steps = min(num_speculative_steps, SERIAL_STEPS)
        super()._multi_step_decode(
            num_reqs, skip_attn, batch_desc, num_tokens_across_dp, seq_lens_cpu_upper_bound, steps
        )
        self._draft_length = 0

    def _generate_fused_drafts(
        self,
        num_reqs: int,
        num_tokens_padded: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, Tensor] | None,
        num_tokens_across_dp: Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode,
        num_speculative_steps: int,
    ) -> None:
        self._draft_length = num_speculative_steps
        steps = min(num_speculative_steps, SERIAL_STEPS)
        super()._generate_fused_drafts(
            num_reqs,
            num_tokens_padded,
            attn_metadata,
            slot_mappings,
            num_tokens_across_dp,
            cudagraph_runtime_mode,
            steps,
        )
        self._draft_length = 0

    def _generate_draft(
        self,
        num_reqs: int,
        num_tokens_padded: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, Tensor] | None,
        num_tokens_across_dp: Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode,
        num_speculative_steps: int,
    ) -> None:
        length = max(num_speculative_steps, self._draft_length)
        super()._generate_draft(
            num_reqs,
            num_tokens_padded,
            attn_metadata,
            slot_mappings,
            num_tokens_across_dp,
            cudagraph_runtime_mode,
            min(length, SERIAL_STEPS),
        )
        if length > SERIAL_STEPS:
            self._draft_heads(num_reqs, length - SERIAL_STEPS)

    def _draft_heads(self, num_reqs: int, count: int) -> None:
        """Write the tokens of the first ``count`` heads to ``draft_tokens[:num_reqs, 2 : 2 + count]``."""
        assert self._hidden is not None
        # A column: vLLM's embedding under tensor parallelism takes contiguous ids only.
        last = self.draft_tokens[:num_reqs, SERIAL_STEPS - 1].contiguous()
        fused = self.model.model.fuse(last, self._hidden[:num_reqs])
        features = self.model.head_features([self.model.last_fused(num_reqs), fused], count)
        offsets = self._head_offsets[:count]
        positions, steps = self.sample_src_positions[:num_reqs, None] + 1 + offsets, SERIAL_STEPS + offsets
        if self.acceptance_estimator is not None or self.draft_watermarker is not None:
            # Both have a row a request and go on from step to step: one head's tokens of all requests at a time.
            by_head = features.view(num_reqs, count, -1)
            for i in range(count):
                self.draft_tokens[:num_reqs, SERIAL_STEPS + i] = self.sample_draft(
                    by_head[:, i].contiguous(),
                    positions[:, i].contiguous(),
                    self.idx_mapping[:num_reqs],
                    self.temperature,
                    self.seeds,
                    steps[i],
                    self.draft_logits,
                )
            return
        tokens = self.sample_draft(
            features,
            positions.flatten(),
            self.idx_mapping[:num_reqs, None].expand(-1, count).flatten(),
            self.temperature,
            self.seeds,
            steps.repeat(num_reqs),
            self.draft_logits,
        )
        self.draft_tokens[:num_reqs, SERIAL_STEPS : SERIAL_STEPS + count] = tokens.view(num_reqs, count)
