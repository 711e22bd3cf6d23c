"""Verification by sample and walk: seeded text is the same with and without drafting.  Model runner V2.

A token is drawn at every row from the target's distribution as vLLM's sampler processes it (temperature, penalties,
grammar, top-k, top-p), with the sampler's own noise, which is keyed by a request's seed and the position.  From the
first row on, the walk goes to the next row while the drawn token is the drafted one; what was drawn up to there is the
step's output.  Each token of it is drawn from ``p(. | the tokens before it)``, whatever was drafted: a draft that is
right is accepted with ``p(draft)``, as by the rejection sampler for a draft without a distribution, and noise is used
once a position.  The rows behind a wrong draft influence nothing.

vLLM's rejection sampler draws twice at a position whose draft it rejects, hence other tokens from the same seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_gumiho.errors import DraftModelError


def walk(drawn: Tensor, drafts: Tensor, cu_num_logits: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """What each request's rows give out: tokens ``[B, steps + 1]`` int64 and how many of them count, ``[B]`` int32.

    drawn ``[N]``: the token drawn at each row.  drafts ``[N]``: the token that each row's input is, so that of row i's
    follower is the draft that row i is asked about; negative where none may be accepted.  cu_num_logits ``[B + 1]``:
    where each request's rows begin.  steps: the most drafts of a request.
    """
    begin, end = cu_num_logits[:-1, None], cu_num_logits[1:, None]
    rows = begin + torch.arange(steps + 1, device=drawn.device)
    following = rows[:, 1:]
    asked = drafts[following.clamp(max=drafts.shape[0] - 1)]
    tokens = drawn[rows.clamp(max=drawn.shape[0] - 1)]
    right = (following < end) & (tokens[:, :-1] == asked)
    return tokens, 1 + right.int().cumprod(1).sum(1, dtype=torch.int32)


class SampleAndWalk(RejectionSampler):
    """In the place of vLLM's rejection sampler, whose handling of logprobs, grammars and large batches it keeps."""

    def _verify(
        self,
        logits: Tensor,
        draft_logits: Tensor | None,
        draft_sampled: Tensor,
        pos: Tensor,
        cu_num_logits: Tensor,
        idx_mapping: Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: Tensor,
        expanded_local_pos: Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Processed logits ``[N, V]``, tokens ``[B, K + 1]`` and how many of them count ``[B]``, of B requests."""
        processed = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        states = self.sampler.sampling_states
        drawn = gumbel_sample(
            processed,
            expanded_idx_mapping,
            states.temperature.gpu,
            states.seeds.gpu,
            pos,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )
        return processed, *walk(drawn, verify_draft_sampled, cu_num_logits, self.num_speculative_steps)


def verify_by_walking(target: nn.Module, vllm_config: VllmConfig) -> None:
    """Have the model runner verify drafts by `SampleAndWalk`, once it makes the state of this target.

    Through ``get_model_state_cls`` and ``custom_sampler``, vLLM's own doors for a model that samples in its own way.
    """
    state = resolve_model_state_cls(vllm_config, target)

    def custom_sampler(self: Any, sampler: Any) -> tuple[Any, Any]:
        if state.custom_sampler(self, sampler) is not None:
            raise DraftModelError(
                f'seeded_text "same": {type(target).__name__} samples in a way of its own ({state.__name__}), which '
                "drafts cannot be verified by; leave seeded_text out"
            )
        return sampler, SampleAndWalk(sampler, vllm_config.speculative_config, self.device)

    walking = type(f"SampleAndWalk{state.__name__}", (state,), {"custom_sampler": custom_sampler})
    target.get_model_state_cls = lambda: walking
