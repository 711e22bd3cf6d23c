"""Adaptive verification on a CPU: vLLM's own manager and estimator, without the CUDA graphs that it asks for.

vLLM trims drafts on the device by what steps cost; a CPU build has neither graphs to time nor streams to copy on.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

# Milliseconds of a step, and of each row in it.
STEP_MS, ROW_MS = 1.0, 0.15
# Draft tokens that steps had, and those that were verified.
TOKENS = {"scheduled": 0, "verified": 0}


class Now:
    """A stream or an event of a device that has done all it was asked for."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def synchronize(self) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...


def turn_on() -> None:
    """For this process and the engines made in it from now on."""
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.spec_decode import adaptive_verification as adaptive

    def manager(
        *, req_states: Any, query_start_loc: Any, num_bonus_tokens: int, max_total_logits: int, **rest: Any
    ) -> Any:
        if not rest["enable_adaptive_verification"]:
            return None
        made = adaptive.AdaptiveVerificationManager(req_states, query_start_loc, num_bonus_tokens, max_total_logits)
        rows = range(1, req_states.max_num_batched_tokens + 1)
        made.set_cost_curves([(1, 0.1), (2, 0.1)], [(n, STEP_MS + ROW_MS * n) for n in rows])
        return made

    reallocate = adaptive.AdaptiveVerificationManager.reallocate_drafts

    def counting(self: Any, *args: Any) -> Any:
        scheduled, _, budget = self._batch_budget
        TOKENS["scheduled"] += sum(scheduled.values())
        TOKENS["verified"] += budget
        return reallocate(self, *args)

    adaptive.AdaptiveVerificationManager.reallocate_drafts = counting
    VllmConfig._validate_adaptive_verification = lambda self: None
    torch.cuda.Stream = torch.cuda.Event = Now
    torch.cuda.current_stream = Now
    adaptive.stream = lambda *streams: contextlib.nullcontext()
    adaptive._assign_draft_token_budget_compiled = adaptive._assign_draft_token_budget
    model_runner.maybe_create_adaptive_verification_manager = manager
    model_runner.resolve_adaptive_cudagraph_mode = lambda mode, **rest: mode
