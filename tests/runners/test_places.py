"""Positions of drafts beside a target whose own have rows and columns (M-RoPE)."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from vllm.v1.spec_decode.eagle import EagleProposer

from vllm_gumiho.runners.v1 import DraftProposer, places_in_texts

# Three requests: a prompt of 4, a step of 3 after 10 tokens, a part of a prompt, 2 tokens after 7.
BATCH = SimpleNamespace(
    query_start_loc=torch.tensor([0, 4, 7, 9], dtype=torch.int32),
    seq_lens=torch.tensor([4, 13, 9], dtype=torch.int32),
    seq_lens_cpu_upper_bound=None,
)
PLACES = [0, 1, 2, 3, 10, 11, 12, 7, 8]


def test_rows_stand_where_their_requests_lengths_say():
    assert places_in_texts(BATCH, 9).tolist() == PLACES


def test_draft_layers_get_places_in_the_text_for_rows_and_columns(monkeypatch):
    """vLLM gives them the first of the three, which stands still along an image."""
    seen = {}
    monkeypatch.setattr(EagleProposer, "set_inputs_first_pass", lambda self, **given: seen.update(given))
    drafter = object.__new__(DraftProposer)
    drafter._batch, drafter._unfinished_prompts = None, torch.empty(0).numpy()
    for positions, wanted in ((torch.zeros(3, 9, dtype=torch.long), [PLACES]), (torch.arange(9), list(range(9)))):
        drafter.set_inputs_first_pass(next_token_ids=torch.zeros(3), cad=BATCH, target_positions=positions)
        assert seen["target_positions"].tolist() == wanted
