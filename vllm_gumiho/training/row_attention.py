"""Attention of packed training rows on a GPU: all sequences of a batch in one masked product a pass.

A GPU has far more arithmetic to give than launches: what a mask hides between sequences costs less than a launch for
each sequence.  `vllm_gumiho.training.attention` is the way of a CPU, and what both compute.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class RowSight:
    """What every query sees, as `vllm_gumiho.training.attention.Sight` has it, of rows ``[R, T]``.

    anchor_index: places of the A anchors among the N tokens, ascending.
    """

    def __init__(self, segments: Tensor, anchors: Tensor):
        """segments ``[R, T]``: numbers of sequences, 0 for padding.  anchors: which tokens are, bool ``[R, T]``."""
        self._shape = segments.shape
        real = (segments > 0).flatten()
        # Slots of the R * T in which the tokens and the anchors lie.
        self._slots = {True: real.nonzero()[:, 0], False: anchors.flatten().nonzero()[:, 0]}
        self.anchor_index = real.cumsum(0)[self._slots[False]] - 1
        same = segments[:, :, None] == segments[:, None, :]
        self._seen = same & torch.ones_like(same[0]).tril()
        self._biases: dict[tuple[int, torch.dtype], Tensor] = {}

    def attend(self, q: Tensor, past: list[tuple[Tensor, Tensor]], all_queries: bool) -> Tensor:
        """q ``[N or A, heads, D]``; past: keys and values ``[n, kv heads, D]`` of the first pass and each later step.

        all_queries: q is of the N tokens, and past of the first pass.  Returns ``[N or A, heads, D]``.
        """
        repeats = q.shape[1] // past[0][0].shape[1]
        keys, values = (
            torch.cat([self._in_rows(pair[i], step == 0) for step, pair in enumerate(past)], dim=2) for i in (0, 1)
        )
        # Repeated: the kernels that take a mask take no groups of query heads.
        keys, values = (x.repeat_interleave(repeats, dim=1) for x in (keys, values))
        bias = self._bias(len(past) - 1, q.dtype)
        out = F.scaled_dot_product_attention(self._in_rows(q, all_queries), keys, values, attn_mask=bias)
        return out.transpose(1, 2).flatten(0, 1)[self._slots[all_queries]]

    def _in_rows(self, x: Tensor, of_tokens: bool) -> Tensor:
        """``[N or A, heads, D]`` -> ``[R, heads, T, D]``, zeros where there is no token or no anchor."""
        rows, length = self._shape
        out = x.new_zeros(rows * length, *x.shape[1:]).index_copy(0, self._slots[of_tokens], x)
        return out.unflatten(0, (rows, length)).transpose(1, 2)

    def _bias(self, steps: int, dtype: torch.dtype) -> Tensor:
        """Added to scores ``[R, 1, T, T + steps * T]``: 0 where a key is seen, else -inf."""
        bias = self._biases.get((steps, dtype))
        if bias is None:
            # A slot sees itself of every step: an anchor its own key, and another nothing that anyone reads.
            own = torch.eye(self._shape[1], dtype=torch.bool, device=self._seen.device).expand_as(self._seen)
            seen = torch.cat([self._seen, *[own] * steps], dim=2)
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None]
            self._biases[steps, dtype] = bias
        return bias
