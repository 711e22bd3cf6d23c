"""Heads shared out among tensor-parallel ranks give what whole heads give, and are shared where that pays."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from places import PROCESSES

from vllm_gumiho.drafters.gumiho import heads as parallel_heads
from vllm_gumiho.drafters.gumiho.heads import CPU_SPLIT_BYTES, SPLIT_BYTES, split_heads
from vllm_gumiho.env import SPLIT_HEADS
from vllm_gumiho.errors import SplitHeadsError

MAIN = PROCESSES / "split_heads_main.py"


@pytest.mark.parametrize(
    ("heads", "head_bytes", "ranks", "switch", "split"),
    [
        (5, SPLIT_BYTES // 2, 2, None, True), (5, SPLIT_BYTES // 2 - 1, 2, None, False),
        (5, SPLIT_BYTES // 4, 8, None, True), (1, SPLIT_BYTES, 2, None, False), (5, SPLIT_BYTES, 1, None, False),
        (5, 1, 2, "1", True), (5, SPLIT_BYTES, 2, "0", False), (5, SPLIT_BYTES, 1, "1", False),
        (5, SPLIT_BYTES, 2, "auto", True),
    ],
)  # fmt: skip
def test_heads_are_shared_where_it_spares_enough_reading(monkeypatch, heads, head_bytes, ranks, switch, split):
    monkeypatch.delenv(SPLIT_HEADS.name, raising=False)
    if switch is not None:
        monkeypatch.setenv(SPLIT_HEADS.name, switch)
    assert split_heads(heads, head_bytes, ranks, on_cpu=False) is split
    assert split_heads(heads, head_bytes * CPU_SPLIT_BYTES // SPLIT_BYTES, ranks, on_cpu=True) is split


def test_sharing_counts_the_heads_that_k_asks_for(monkeypatch):
    monkeypatch.setattr(parallel_heads, "lowest_of_all_ranks", lambda values: values)
    group = SimpleNamespace(world_size=2, rank_in_group=1)
    monkeypatch.setattr(parallel_heads, "get_tp_group", lambda: group)
    monkeypatch.setattr(parallel_heads, "CPU_SPLIT_BYTES", 2 * 4 * 8 * (7 * 8 + 6))  # two float32 heads of H = 8
    shares = {k: parallel_heads.ParallelHeads(5, 2, 8, torch.float32, asked_for=k - 2) for k in (1, 3, 5, 6, 7)}
    assert {k: heads.ranks for k, heads in shares.items()} == {1: 1, 3: 1, 5: 1, 6: 2, 7: 2}
    assert {k: heads.bias.shape[0] for k, heads in shares.items()} == {1: 0, 3: 1, 5: 3, 6: 2, 7: 2}


def test_ranks_that_disagree_all_keep_whole_heads(monkeypatch):
    monkeypatch.setenv(SPLIT_HEADS.name, "1")
    monkeypatch.setattr(parallel_heads, "get_tp_group", lambda: SimpleNamespace(world_size=2, rank_in_group=0))
    monkeypatch.setattr(parallel_heads, "lowest_of_all_ranks", lambda values: [0 for _ in values])
    assert parallel_heads.ParallelHeads(5, 2, 8, torch.float32).ranks == 1


def test_a_wrong_switch_is_named(monkeypatch):
    monkeypatch.setenv(SPLIT_HEADS.name, "yes")
    with pytest.raises(SplitHeadsError, match="VLLM_GUMIHO_SPLIT_HEADS='yes' is not a choice; set it to auto"):
        split_heads(5, SPLIT_BYTES, 1, on_cpu=True)


@pytest.mark.parametrize(
    ("ranks", "shares"), [(2, {5: 3, 1: 1}), pytest.param(3, {5: 2, 1: 1}, marks=pytest.mark.long)]
)
def test_shared_heads_equal_whole_ones(ranks, shares):
    """Real processes and vLLM's own collective; every K; also with fewer heads than ranks."""
    sizes = ["--hidden", "24", "--heads", "5,1", "--counts", "5,4,3,2,1", "--batches", "1,7"]
    done = subprocess.run(
        [sys.executable, str(MAIN), "--ranks", str(ranks), *sizes],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads(done.stdout.splitlines()[-1])
    assert len(cells) == 12
    for cell in cells:
        assert cell["ranks"] == [1, ranks]
        assert cell["own"] == shares[cell["heads"]]
        assert cell["largest"] > 1
        # float32 on both sides; a product of other shape may sum 24 or 48 terms in another order.
        assert cell["difference"] < 1e-5 * cell["largest"]
