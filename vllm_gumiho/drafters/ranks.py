"""What the ranks of a tensor-parallel group agree on, and work that they share out."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.distributed import get_tp_group, tensor_model_parallel_all_gather

# Rows below which each rank does them all: what is saved is less than the gathering takes.  Not measured.
SHARED_ROWS = 64


def lowest_of_all_ranks(values: list[int]) -> list[int]:
    """Each value's lowest over the ranks; every rank must call with as many, or others wait for it for ever."""
    group = get_tp_group()
    if group.world_size == 1:
        return values
    lowest = torch.tensor(values)
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return lowest.tolist()


def on_shares(compute: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``compute(rows)`` of a row-by-row function, each rank doing its share; rows ``[N, ...]`` are equal on all."""
    group, count = get_tp_group(), rows.shape[0]
    if group.world_size == 1 or count < SHARED_ROWS:
        return compute(rows)
    size = -(-count // group.world_size)
    first = group.rank_in_group * size
    mine = rows[first : first + size]
    # As many on each: the last may have fewer, or none.
    filled = F.pad(mine, (0, 0) * (mine.ndim - 1) + (0, size - mine.shape[0]))
    return tensor_model_parallel_all_gather(compute(filled), dim=0)[:count]
