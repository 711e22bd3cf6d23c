"""The heads as a module: only chosen kernels are launched, and a single launch that gave up is left."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from vllm_gumiho import runners
from vllm_gumiho.drafters.gumiho import heads as module
from vllm_gumiho.drafters.gumiho.heads import FLAG_EVERY, ParallelHeads
from vllm_gumiho.kernels.parallel_heads import GAVE_UP, HeadsPath


@pytest.fixture
def heads(monkeypatch) -> ParallelHeads:
    """Three heads of H = 16 on one rank."""
    monkeypatch.setattr(module, "lowest_of_all_ranks", lambda values: values)
    monkeypatch.setattr(module, "get_tp_group", lambda: SimpleNamespace(world_size=1, rank_in_group=0))
    return ParallelHeads(3, 2, 16, torch.float32)


def test_only_what_was_chosen_is_launched(monkeypatch, heads):
    """By heads asked for and batch tile: anything else is the library's."""
    launched = []

    def run(m, weights, scales, path, counters):
        launched.append((len(weights.bias), len(m[0]), path))
        return m[0].new_zeros(len(weights.bias), len(m[0]), 16)

    monkeypatch.setattr(module, "parallel_heads", run)
    heads.paths = {(1, 16): HeadsPath.FUSED, (3, 32): HeadsPath.STAGES}
    asked = [(1, 1), (1, 16), (1, 17), (2, 1), (3, 16), (3, 17), (3, 32), (3, 33)]
    for count, batch in asked:
        heads([torch.zeros(batch, 16)] * 2, count)
    library = HeadsPath.BATCHED
    paths = [HeadsPath.FUSED, HeadsPath.FUSED, library, library, library, HeadsPath.STAGES, HeadsPath.STAGES, library]
    assert launched == [(*one, path) for one, path in zip(asked, paths, strict=True)]


def test_heads_of_8_bit_rows_go_in_parts_of_the_largest_tile(monkeypatch, heads):
    """The library's products would widen them at each call."""
    monkeypatch.setattr(module, "parallel_heads", lambda m, weights, scales, path, counters: path)
    narrow = ParallelHeads(3, 2, 16, torch.float32, weights=torch.int8)
    for one in (heads, narrow):
        one.paths = {(3, 32): HeadsPath.STAGES}
    batches = (16, 32, 33, 400)
    found = [[one([torch.zeros(batch, 16)] * 2, 3) for batch in batches] for one in (heads, narrow)]
    library, kernel = HeadsPath.BATCHED, HeadsPath.STAGES
    assert found == [[library, kernel, library, library], [library, kernel, kernel, kernel]]


@pytest.mark.parametrize("weights", [None, torch.int8])
@pytest.mark.parametrize(("asked_for", "kept"), [(None, 3), (9, 3), (2, 2), (1, 1), (0, 0), (-1, 0)])
def test_heads_that_no_k_asks_for_take_no_memory(heads, asked_for, kept, weights):
    """K of 1 and 2 run none of them."""
    some = ParallelHeads(3, 2, 16, torch.float32, asked_for, weights)
    assert {len(parameter) for parameter in some.parameters()} == {kept}
    kinds = ("weight", "bias", *(["weight_scale"] if weights else []))
    for head, stage, kind in itertools.product(range(3), range(6), kinds):
        assert (some.destination(head, stage, kind) is None) is (head >= kept)


def looked(heads: ParallelHeads, drafts: int) -> list[int]:
    """The drafts at which the single launch was left."""
    return [number for number in range(1, drafts + 1) if heads.leave_single_launch()]


def test_a_launch_that_gave_up_is_left_for_one_per_stage(heads):
    heads.paths = {(1, 16): HeadsPath.FUSED, (3, 16): HeadsPath.FUSED}
    assert looked(heads, 2 * FLAG_EVERY) == []
    heads.counters[GAVE_UP] = 1
    heads.counters[2] = 5
    assert looked(heads, 3 * FLAG_EVERY) == [FLAG_EVERY]
    assert heads.paths == {(1, 16): HeadsPath.STAGES, (3, 16): HeadsPath.STAGES}
    assert not heads.counters.any()


def test_all_ranks_leave_together(monkeypatch, heads):
    """One that waits for a collective in a graph and one outside of it would wait for ever."""
    monkeypatch.setattr(module, "lowest_of_all_ranks", lambda values: [0])
    heads.paths = {(3, 16): HeadsPath.FUSED}
    assert looked(heads, FLAG_EVERY) == [FLAG_EVERY]


def test_other_paths_are_not_looked_at(monkeypatch, heads):
    monkeypatch.setattr(module, "lowest_of_all_ranks", lambda values: pytest.fail("a collective"))
    heads.counters[GAVE_UP] = 1
    for paths in ({}, {(3, 16): HeadsPath.STAGES}):
        heads.paths = paths
        assert looked(heads, 2 * FLAG_EVERY) == []


def test_v2_draws_no_more_of_its_graphs_once_their_launch_gave_up(monkeypatch):
    """A captured graph would launch it again; the log says so once."""
    from vllm_gumiho.runners import v2

    told, released = [], []
    monkeypatch.setattr(runners.logger, "warning", lambda text, *a: told.append(text))
    monkeypatch.setattr(v2.EagleSpeculator, "propose", lambda self, *a: (len(released), *a))
    answers = iter([False, True, False])
    speculator = object.__new__(v2.GumihoSpeculator)
    speculator.model = SimpleNamespace(heads=SimpleNamespace(leave_single_launch=lambda: next(answers)))
    speculator.decode_cudagraph_manager = SimpleNamespace(release_graphs=lambda: released.append(1))
    assert [speculator.propose("batch") for _ in range(3)] == [(0, "batch"), (1, "batch"), (1, "batch")]
    assert len(told) == 1
    assert "one launch per stage from now on" in told[0]
