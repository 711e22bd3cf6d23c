"""Work that ranks share out: each its rows, and together what one would have done."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vllm_gumiho.drafters import ranks


@pytest.mark.parametrize("count", [ranks.SHARED_ROWS - 1, ranks.SHARED_ROWS, 100, 129])
@pytest.mark.parametrize("world", [1, 3, 8])
def test_shares_are_the_whole(monkeypatch, count, world):
    rows, done = torch.randn(count, 4, 5), []

    def compute(x: Tensor) -> Tensor:
        done.append(x.shape[0])
        return x.sum(-1) ** 2

    def on(rank: int, others: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        kept: list[Tensor] = []

        def gather(x: Tensor, dim: int) -> Tensor:
            assert dim == 0
            kept.append(x)
            return torch.cat([*others, x, *[torch.full_like(x, torch.nan)] * (world - rank - 1)])

        group = SimpleNamespace(world_size=world, rank_in_group=rank)
        monkeypatch.setattr(ranks, "get_tp_group", lambda: group)
        monkeypatch.setattr(ranks, "tensor_model_parallel_all_gather", gather)
        return ranks.on_shares(compute, rows), kept

    others: list[Tensor] = []
    for rank in range(world):
        found, mine = on(rank, others)
        others += mine
    torch.testing.assert_close(found, rows.sum(-1) ** 2)
    shared = world > 1 and count >= ranks.SHARED_ROWS
    assert done == [-(-count // world) if shared else count] * world
