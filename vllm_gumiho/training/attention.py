"""Attention of packed training sequences on a CPU, one after the other: nothing is spent between sequences.

Flat order: the N tokens of all sequences end to end, and the A anchors among them in the same order.  A query of the
first pass sees its sequence up to itself.  At a later serial step only anchors are queries: each sees the first pass's
keys up to itself, then its own keys of the steps before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries of one product: keys behind a block are left out, and its scores stay in the cache.
CPU_BLOCK = 256
# Products have sizes in steps of that: each new size costs some milliseconds of compilation.
CPU_GRAIN = 32


@dataclass(frozen=True)
class Block:
    """Some queries that follow one another, and the keys of the first pass that they see.

    queries: how many.  sequence: whose first ``keys`` tokens; -1 for tokens whose attention nobody needs.
    at: where each query lies in its sequence, ``[queries]``; None of a block whose attention nobody needs.
    """

    queries: int
    sequence: int = -1
    keys: int = 0
    at: Tensor | None = None


class Sight:
    """What every query sees.

    anchor_index: places of the A anchors among the N tokens, ascending.
    """

    def __init__(self, lengths: list[int], anchors: Tensor):
        """lengths: of the sequences, N tokens in all.  anchors: which tokens are, bool ``[N]``."""
        self.anchor_index = anchors.nonzero()[:, 0]
        self._lengths = lengths
        # Every token is in one block of the first list, every anchor in one of the second.
        self._blocks: dict[bool, list[Block]] = {True: [], False: []}
        self._biases: dict[tuple[bool, int, int, torch.dtype], Tensor] = {}
        for sequence, (length, mine) in enumerate(zip(lengths, anchors.split(lengths), strict=True)):
            self._add(sequence, length, mine.nonzero()[:, 0])

    def _add(self, sequence: int, length: int, places: Tensor) -> None:
        """places: of a sequence's anchors."""
        # What follows the last anchor is seen by none.
        needed = int(places[-1]) + 1 if len(places) else 0
        for first in range(0, needed, CPU_BLOCK):
            last = min(first + CPU_BLOCK, needed)
            self._blocks[True].append(Block(last - first, sequence, last, torch.arange(first, last)))
        if needed < length:
            self._blocks[True].append(Block(length - needed))
        for at in places.split(CPU_BLOCK) if len(places) else ():
            self._blocks[False].append(Block(len(at), sequence, int(at[-1]) + 1, at))

    def attend(self, q: Tensor, past: list[tuple[Tensor, Tensor]], all_queries: bool) -> Tensor:
        """q ``[N or A, heads, D]``; past: keys and values ``[n, kv heads, D]`` of the first pass and each later step.

        all_queries: q is of the N tokens, and past of the first pass.  Returns ``[N or A, heads, D]``.
        """
        blocks = self._blocks[all_queries]
        if all(block.sequence < 0 for block in blocks):
            # In the graph all the same: every process of a distributed run has a gradient for the same parameters.
            return q + sum(k.sum() + v.sum() for k, v in past) * 0
        # Split and not sliced: the gradient of a split is one concatenation.
        queries = q.split([block.queries for block in blocks])
        first = [x.split(self._lengths) for x in past[0]]
        later = [tuple(x.split([block.queries for block in blocks]) for x in pair) for pair in past[1:]]
        found = []
        for number, (block, mine) in enumerate(zip(blocks, queries, strict=True)):
            if block.sequence < 0:
                found.append(mine)
                continue
            k, v = (
                self._grained(first[i][block.sequence][: block.keys], *(pair[i][number] for pair in later))
                for i in (0, 1)
            )
            found.append(self._one(mine, k, v, block, (all_queries, number, len(later), q.dtype)))
        return torch.cat(found)

    def _one(self, q: Tensor, k: Tensor, v: Tensor, block: Block, name: tuple[bool, int, int, torch.dtype]) -> Tensor:
        groups, heads = k.shape[1], q.shape[1]
        bias = self._biases.get(name)
        if bias is None:
            bias = self._biases[name] = self._bias(block, name[2], heads // groups, q.dtype)
        # Query heads of a group read the same keys: one product of all their rows.
        size, width = q.shape[0], q.shape[2]
        rows = self._grained(q).unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)
        scores = torch.baddbmm(bias.expand(groups, -1, -1), rows, k.permute(1, 2, 0), alpha=width**-0.5)
        out = torch.bmm(scores.softmax(-1), v.transpose(0, 1))
        return out.unflatten(1, (heads // groups, -1)).permute(2, 0, 1, 3).flatten(1, 2)[:size]

    def _bias(self, block: Block, steps: int, repeats: int, dtype: torch.dtype) -> Tensor:
        """Added to scores: 0 where a key is seen, else -inf.  ``[queries, keys]``, repeated for a product's rows."""
        assert block.at is not None
        device = block.at.device
        # Queries that fill up see the first key, so that their rows are finite.
        at = torch.zeros(_up(block.queries), dtype=torch.long, device=device)
        at[: block.queries] = block.at
        seen = torch.arange(_up(block.keys), device=device) <= at[:, None]
        own = torch.eye(len(at), dtype=torch.bool, device=device)
        seen = torch.cat([seen, *[own] * steps], dim=1)
        bias = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
        return bias.repeat(repeats, 1)

    def _grained(self, *parts: Tensor) -> Tensor:
        """Parts ``[n, heads, D]`` end to end, each filled up with zeros to the size of products."""
        filled = [F.pad(x, (0, 0, 0, 0, 0, _up(len(x)) - len(x))) for x in parts]
        return filled[0] if len(filled) == 1 else torch.cat(filled)


def _up(size: int) -> int:
    """A size of products, at least this one."""
    return -(-size // CPU_GRAIN) * CPU_GRAIN
