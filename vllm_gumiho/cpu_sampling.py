"""A correction to the CPU build of vLLM 0.32, applied only in an engine that drafts with Gumiho.

Its rejection sampler expands each request's temperature over its draft tokens into a copy that is then thrown away
(``_expand_kernel_impl`` converts the float output to int64), so drafts of sampled requests were checked against a
distribution at whatever temperature lay in memory.  Greedy requests are not affected, nor are GPU builds.
"""

from __future__ import annotations

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


def correct_expansion() -> None:
    """Put the function above in the place of the CPU build's."""
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
