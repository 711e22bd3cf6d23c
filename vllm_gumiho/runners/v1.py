"""Gumiho drafting in vLLM's model runner V1."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config.vllm import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.eagle import EagleProposer

from vllm_gumiho.errors import DraftModelError
from vllm_gumiho.runners import finish_loading, leave_single_launch, logger, view_of, wants_same_seeded_text
from vllm_gumiho.runners.draft_length import DraftLengths, chances_of_drawn, chances_of_greedy


def places_in_texts(cad: CommonAttentionMetadata, rows: int) -> Tensor:
    """Where each row of a batch stands in its request's text, ``[rows]``, by the batch's lengths."""
    starts = cad.query_start_loc
    numbers = torch.arange(rows, device=starts.device, dtype=starts.dtype)
    owner = torch.searchsorted(starts[1:], numbers, right=True)
    first = cad.seq_lens - starts[1:] + starts[:-1]
    return first[owner] + numbers - starts[owner]


class DraftProposer(EagleProposer):
    """What every drafter of ours does in V1: says what drafts and how, and finds greedy tokens by its own model.

    And gives the draft layers the token that follows a part of a prompt, where vLLM 0.32 gives the prompt's last one.
    And drafts for a batch in which a request ends within a draft: the base class leaves out what is past its end.
    And hands on as much of each draft as is worth verifying, where that is asked for.
    """

    _batch: Any = None
    _unfinished_prompts: np.ndarray = np.empty(0, dtype=np.int64)

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any):
        if wants_same_seeded_text(vllm_config):
            raise DraftModelError(
                'seeded_text "same" needs model runner V2, as the noise of V1 is not keyed by position; set '
                "VLLM_USE_V2_MODEL_RUNNER=1, or leave seeded_text out"
            )
        super().__init__(vllm_config, *args, **kwargs)
        # The runner drafts for nobody in a step where a draft would pass this; the draft layers never read its tokens.
        spec = vllm_config.speculative_config
        if spec.max_model_len is None:
            spec.draft_model_config.max_model_len = self.max_model_len + spec.num_speculative_tokens
        self._lengths = DraftLengths.asked_for(vllm_config)
        if self._lengths is not None and vllm_config.scheduler_config.async_scheduling:
            logger.warning(
                "Gumiho: drafts keep their full length under async scheduling, which sets a step's rows before they "
                "are drafted; --no-async-scheduling lets num_speculative_tokens_per_request work"
            )
            self._lengths = None

    def load_model(self, target_model: nn.Module) -> None:
        """Load the drafter beside its target; says once what drafts and how."""
        super().load_model(view_of(target_model, self.vllm_config))
        self.use_local_argmax_reduction = True  # greedy drafts come from the model's `get_top_tokens`
        finish_loading(self.model, target_model, self.vllm_config, "V1")

    def validate_same_kv_cache_group(self, kv_cache_config: Any) -> None:
        """As the base class, which has one block table for all draft layers.  Raises: DraftModelError."""
        try:
            super().validate_same_kv_cache_group(kv_cache_config)
        except AssertionError:
            raise DraftModelError(
                f"target {self.vllm_config.model_config.model}: vLLM puts the draft layers into several KV cache "
                "groups, which model runner V1 does not take; set disable_hybrid_kv_cache_manager=True "
                "(--disable-hybrid-kv-cache-manager)"
            ) from None

    def prepare_next_token_ids_padded(
        self, sampled_token_ids: Tensor, requests: Any, gpu_input_batch: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As the base class; the batch is kept for the pass that follows."""
        self._batch = gpu_input_batch
        return super().prepare_next_token_ids_padded(sampled_token_ids, requests, gpu_input_batch, *args, **kwargs)

    def set_inputs_first_pass(
        self, *args: Any, next_token_ids: Tensor, cad: CommonAttentionMetadata, **kwargs: Any
    ) -> tuple[int, Tensor, CommonAttentionMetadata]:
        """As the base class; a request of which more is to be prefilled goes on with its own next token.

        Draft layers have one rotary position a token, its place in the text, where the target has rows and columns.
        """
        positions = kwargs.get("target_positions")
        if positions is not None and positions.ndim == 2:
            kwargs["target_positions"] = places_in_texts(cad, positions.shape[1])[None]
        batch, self._batch = self._batch, None
        self._unfinished_prompts = self._unfinished_prompts[:0]
        if batch is not None and cad.seq_lens_cpu_upper_bound is not None:
            ends = cad.seq_lens_cpu_upper_bound.numpy()  # exact for these requests
            (rows,) = (ends < batch.num_tokens_no_spec[: len(ends)]).nonzero()
            self._unfinished_prompts = rows
            if len(rows):
                device = next_token_ids.device
                following = async_tensor_h2d(batch.token_ids_cpu[rows, ends[rows]], device, next_token_ids.dtype)
                # vLLM keeps its own for the next step's input.
                next_token_ids = next_token_ids.clone()
                next_token_ids[async_tensor_h2d(rows, device)] = following
        return super().set_inputs_first_pass(*args, next_token_ids=next_token_ids, cad=cad, **kwargs)

    def _greedy_sample(self, hidden_states: Tensor) -> Tensor:
        if self._lengths is None:
            return super()._greedy_sample(hidden_states)
        tokens, chances = chances_of_greedy(self.model.compute_logits(hidden_states))
        self._lengths.add(chances)
        return tokens

    def _sample_draft_tokens(
        self, hidden_states: Tensor, sampling_metadata: SamplingMetadata
    ) -> tuple[Tensor, Tensor | None]:
        tokens, probs = super()._sample_draft_tokens(hidden_states, sampling_metadata)
        if self._lengths is not None and probs is not None:
            greedy = sampling_metadata.temperature == 0
            greedy = greedy.repeat_interleave(tokens.numel() // greedy.numel())
            self._lengths.add(chances_of_drawn(probs, tokens, greedy))
        return tokens, probs

    @torch.inference_mode()
    def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> Tensor | list[list[int]]:
        """Draft token ids ``[B, K]`` int64 for K = num_speculative_tokens, or lists of what is sent of each draft."""
        if self._lengths is None:
            return self._draft(num_speculative_tokens, *args, **kwargs)
        self._lengths.begin()
        drafted = self._draft(num_speculative_tokens, *args, **kwargs)
        return self._lengths.cut(drafted, self._unfinished_prompts)

    def _draft(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> Tensor:
        """Draft token ids ``[B, K]``; arguments as of the base class's `propose`."""
        return self._serial_draft(num_speculative_tokens, *args, **kwargs)

    def _serial_draft(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> Tensor:
        """A pass a token."""
        return super().propose(num_speculative_tokens, *args, **kwargs)


class GumihoProposer(DraftProposer):
    """Serial steps through `EagleProposer.propose`, then every head asked for in one batched computation.

    The base class samples once per serial step; `_sample_draft_tokens` keeps what each step drafted from, which is
    what the heads are fed.
    """

    num_speculative_tokens: int

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.num_serial_steps: int = self.draft_model_config.hf_config.num_serial_steps
        self._hidden: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._fused: list[Tensor] = []

    def dummy_run(
        self, num_tokens: int, use_cudagraphs: bool = True, is_graph_capturing: bool = False, **kwargs: Any
    ) -> None:
        """As much work and memory as a draft of the largest batch: the serial steps' passes, then the heads."""
        length: int = self.num_speculative_tokens
        self.num_speculative_tokens = min(length, self.num_serial_steps)
        try:
            super().dummy_run(num_tokens, use_cudagraphs, is_graph_capturing, **kwargs)
        finally:
            self.num_speculative_tokens = length
        if length > self.num_serial_steps and not is_graph_capturing:  # the heads are in no graph of V1's
            self._dummy_heads(min(num_tokens, self.max_batch_size), length - self.num_serial_steps)

    @torch.inference_mode()
    def _dummy_heads(self, rows: int, count: int) -> None:
        """Heads and tokens of ``rows`` requests; what vLLM measures its memory by has their logits in it."""
        fused = self.model.model.fuse(self.input_ids[:rows], self.hidden_states[:rows])
        features = self.model.head_features([fused] * self.num_serial_steps, count)
        if self.model.greedy_drafts:
            self._greedy_sample(features)
        else:
            self.model.compute_logits(features).softmax(dim=-1, dtype=torch.float32)

    def _sample_draft_tokens(
        self, hidden_states: Tensor, sampling_metadata: SamplingMetadata
    ) -> tuple[Tensor, Tensor | None]:
        tokens, probs = super()._sample_draft_tokens(hidden_states, sampling_metadata)
        if self._hidden:
            # The pass that made these features fused (y, h) of the step before: o of that step.
            fused = self.model.last_fused(hidden_states.shape[0])
            last_pass = len(self._hidden) == self.num_serial_steps - 1
            self._fused.append(fused if last_pass else fused.clone())
        self._hidden.append(hidden_states)
        self._tokens.append(tokens)
        return tokens, probs

    def _draft(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> Tensor:
        self._hidden, self._tokens, self._fused = [], [], []
        leave_single_launch(self.model)
        drafted = self._serial_draft(min(num_speculative_tokens, self.num_serial_steps), *args, **kwargs)
        self.num_speculative_tokens = num_speculative_tokens
        num_heads = num_speculative_tokens - self.num_serial_steps
        if num_heads <= 0:
            return drafted

        self._fused.append(self.model.model.fuse(self._tokens[-1].int(), self._hidden[-1]))
        features = self.model.head_features(self._fused, num_heads)
        metadata = kwargs["sampling_metadata"]
        tokens, probs = super()._sample_draft_tokens(features, metadata)
        if probs is not None:
            head_probs = probs.view(-1, num_heads, probs.shape[-1])
            self._last_draft_probs: Tensor | None = torch.cat((self.take_last_draft_probs(), head_probs), dim=1)
        return torch.cat((drafted, tokens.view(-1, num_heads)), dim=1)


class LayeredGumihoProposer(GumihoProposer):
    """As the base class; vLLM's own proposer has the model make features of several layers' states."""

    def dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """As much memory as a draft of the largest batch takes: the layers' states to features, then the passes."""
        self._dummy_features(num_tokens)
        super().dummy_run(num_tokens, *args, **kwargs)

    @torch.inference_mode()
    def _dummy_features(self, rows: int) -> None:
        width = self.model.first_step.num_states * self.hidden_states.shape[-1]
        self.model.combine_hidden_states(self.hidden_states.new_zeros(rows, width))
