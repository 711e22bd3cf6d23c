"""Attention of packed training sequences, one sequence after the other: nothing is spent between sequences.

Flat order: the N tokens of all sequences end to end, and the A anchors among them in the same order.  A query of the
first pass sees its sequence up to itself.  At a later serial step only anchors are queries: each sees the first pass's
keys up to itself, then its own keys of the steps before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries of one product on a CPU: keys behind a block are left out, and its scores stay in the cache.
CPU_BLOCK = 256


@dataclass(frozen=True)
class Block:
    """Queries ``first:last`` of flat order (tokens or anchors), keys ``start:stop`` of the tokens.

    at: where each query lies in its sequence, ``[last - first]``; None where queries are all of ``start:stop``.
    """

    first: int
    last: int
    start: int
    stop: int
    at: Tensor | None


class Sight:
    """What every query sees.

    anchors: which of the N tokens are anchors, bool ``[N]``.  anchor_index: their places, ``[A]``.
    """

    def __init__(self, lengths: list[int], anchors: Tensor, by_product: bool | None = None):
        """lengths: of the sequences, N tokens in all.  by_product: plain products, faster on a CPU alone (None)."""
        self.anchors = anchors
        self.anchor_index = anchors.nonzero()[:, 0]
        self._by_product = anchors.device.type == "cpu" if by_product is None else by_product
        self._all: list[Block] = []
        self._anchors: list[Block] = []
        places = self.anchor_index.tolist()
        start, done = 0, 0
        for length in lengths:
            stop = start + length
            until = done
            while until < len(places) and places[until] < stop:
                until += 1
            if until > done:
                self._add(start, stop, done, until, places)
            start, done = stop, until
        self._biases: dict[tuple[int, int, int, torch.dtype], Tensor] = {}

    def _add(self, start: int, stop: int, done: int, until: int, places: list[int]) -> None:
        size = CPU_BLOCK if self._by_product else stop - start
        # Causal: what follows the last anchor is seen by none.
        stop = places[until - 1] + 1
        for first in range(start, stop, size):
            last = min(first + size, stop)
            at = torch.arange(first - start, last - start) if self._by_product else None
            self._all.append(Block(first, last, start, last, at))
        for first in range(done, until, size):
            last = min(first + size, until)
            at = self.anchor_index[first:last] - start
            self._anchors.append(Block(first, last, start, places[last - 1] + 1, at))

    def attend(self, q: Tensor, past: list[tuple[Tensor, Tensor]], all_queries: bool) -> Tensor:
        """q ``[N or A, heads, D]``; past: keys and values ``[n, kv heads, D]`` of the first pass and each later step.

        all_queries: q is of the N tokens, and past of the first pass.  Returns ``[N or A, heads, D]``.
        """
        blocks = self._all if all_queries else self._anchors
        out = torch.zeros_like(q) if len(blocks) == 0 else None
        if out is not None:
            # In the graph all the same: every process of a distributed run has a gradient for the same parameters.
            return out + q * 0 + sum(k.sum() + v.sum() for k, v in past) * 0
        found, reached = [], 0
        for number, block in enumerate(blocks):
            if block.first > reached:
                found.append(q.new_zeros(block.first - reached, *q.shape[1:]))
            reached = block.last
            own = slice(block.first, block.last)
            kept = slice(block.start, block.stop)
            keys = [past[0][0][kept], *(k[own] for k, _ in past[1:])]
            values = [past[0][1][kept], *(v[own] for _, v in past[1:])]
            k = keys[0] if len(keys) == 1 else torch.cat(keys)
            v = values[0] if len(values) == 1 else torch.cat(values)
            found.append(self._one(q[own], k, v, block, (number, len(past), int(all_queries), q.dtype)))
        if reached < q.shape[0]:
            found.append(q.new_zeros(q.shape[0] - reached, *q.shape[1:]))
        return torch.cat(found)

    def _one(self, q: Tensor, k: Tensor, v: Tensor, block: Block, name: tuple[int, int, int, torch.dtype]) -> Tensor:
        groups, heads = k.shape[1], q.shape[1]
        if block.at is None:
            out = F.scaled_dot_product_attention(_split(q), _split(k), _split(v), is_causal=True, enable_gqa=True)
            return out[0].transpose(0, 1)
        bias = self._biases.get(name)
        if bias is None:
            bias = self._biases[name] = self._bias(block, name[1] - 1, heads // groups, q.dtype)
        if not self._by_product:
            out = F.scaled_dot_product_attention(_split(q), _split(k), _split(v), attn_mask=bias, enable_gqa=True)
            return out[0].transpose(0, 1)
        # Query heads of a group read the same keys: one product of all their rows.
        size, width = q.shape[0], q.shape[2]
        rows = q.view(size, groups, -1, width).permute(1, 2, 0, 3).reshape(groups, -1, width)
        scores = torch.baddbmm(bias.expand(groups, -1, -1), rows, k.permute(1, 2, 0), alpha=width**-0.5)
        out = torch.bmm(scores.softmax(-1), v.transpose(0, 1))
        return out.view(groups, -1, size, width).permute(2, 0, 1, 3).reshape(size, heads, width)

    def _bias(self, block: Block, steps: int, repeats: int, dtype: torch.dtype) -> Tensor:
        """Added to scores: 0 where a key is seen, else -inf.  ``[queries, keys]``, repeated for a product's rows."""
        assert block.at is not None
        device = block.at.device
        seen = torch.arange(block.stop - block.start, device=device) <= block.at[:, None]
        own = torch.eye(block.last - block.first, dtype=torch.bool, device=device)
        seen = torch.cat([seen, *[own] * steps], dim=1)
        bias = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
        return bias.repeat(repeats, 1) if self._by_product else bias


def _split(x: Tensor) -> Tensor:
    """``[n, heads, D]`` -> ``[1, heads, n, D]``."""
    return x.transpose(0, 1)[None]
