"""Corrections to the CPU build of vLLM 0.32, applied only in an engine that drafts with Gumiho.

Its rejection sampler expands each request's temperature over its draft tokens into a copy that is then thrown away
(``_expand_kernel_impl`` converts the float output to int64), so drafts of sampled requests were checked against a
distribution at whatever temperature lay in memory.  And a request with top_k stops the engine in any step without a
draft, such as its first: ``apply_top_k_only`` takes the largest of no values.  Greedy requests are not affected, nor
are GPU builds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> Tensor:
    """Repeat ``x [B]`` over each request's tokens -> ``[num_tokens]``; values ``replace_from`` become ``replace_to``.

    cu_num_tokens: inclusive prefix sum ``[B]`` of the requests' token counts.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    expanded = x.repeat_interleave(counts.long(), output_size=num_tokens)
    return torch.where(expanded == replace_from, torch.full_like(expanded, replace_to), expanded)


def unless_empty(constrain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``constrain(logits [N, V], ...)`` for N > 0; no logits stay as they are."""

    @functools.wraps(constrain)
    def constrained(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return constrain(logits, *args, **kwargs) if logits.shape[0] else logits

    return constrained


@functools.cache
def correct_expansion() -> None:
    """Put the functions above in the place of the CPU build's, once a process."""
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    rejection_sampler.apply_sampling_constraints = unless_empty(rejection_sampler.apply_sampling_constraints)
