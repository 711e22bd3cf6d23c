"""What all ranks of a tensor-parallel group must agree on, before half of it waits in a collective for ever."""

from __future__ import annotations

import torch
from vllm.distributed import get_tp_group


def lowest_of_all_ranks(values: list[int]) -> list[int]:
    """Each value's lowest over the ranks; every rank must call with as many."""
    group = get_tp_group()
    if group.world_size == 1:
        return values
    lowest = torch.tensor(values)
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return lowest.tolist()
