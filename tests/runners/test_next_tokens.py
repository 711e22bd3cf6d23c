"""Model runner V1: the token beside the last state of a part of a prompt is the one that follows it.

vLLM 0.32 gives the prompt's last token there.  The draft layers keep what they made of it in their KV cache.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from vllm_gumiho.runners.v1 import DraftProposer

# Three requests: a part of a prompt, a whole prompt, and one that decodes with drafts.
TEXTS = np.array([[10, 11, 12, 13, 14, 15, 0, 0], [20, 21, 22, 0, 0, 0, 0, 0], [30, 31, 32, 33, 34, 0, 0, 0]], np.int32)
LENGTHS = np.array([6, 3, 5], np.int32)
FROM_VLLM = [15, 99, 77]


@pytest.fixture
def given(monkeypatch):
    """What reaches vLLM's own first pass."""
    seen = []
    next_tokens = torch.tensor(FROM_VLLM, dtype=torch.int32)
    monkeypatch.setattr(
        SpecDecodeBaseProposer, "prepare_next_token_ids_padded", lambda *_, **__: (next_tokens, torch.ones(3))
    )
    monkeypatch.setattr(
        SpecDecodeBaseProposer, "set_inputs_first_pass", lambda self, **given: seen.append(given["next_token_ids"])
    )
    return seen


def first_pass(ends: list[int] | None, prepared: bool = True) -> torch.Tensor:
    """One step of the runner; returns the tokens that it keeps."""
    proposer = object.__new__(DraftProposer)
    batch = SimpleNamespace(token_ids_cpu=TEXTS, num_tokens_no_spec=LENGTHS)
    tokens = torch.tensor(FROM_VLLM, dtype=torch.int32)
    if prepared:
        tokens, _ = proposer.prepare_next_token_ids_padded(torch.zeros(3, 2), {}, batch, None)
    bound = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    proposer.set_inputs_first_pass(next_token_ids=tokens, cad=SimpleNamespace(seq_lens_cpu_upper_bound=bound))
    return tokens


def test_only_a_part_of_a_prompt_goes_on_with_its_own_next_token(given):
    kept = first_pass([4, 3, 8])
    assert given[0].tolist() == [14, 99, 77]
    assert given[0].dtype == torch.int32
    assert kept.tolist() == FROM_VLLM, "vLLM's own tokens were changed"


@pytest.mark.parametrize(("ends", "prepared"), [([6, 3, 8], True), (None, True), ([4, 3, 8], False)])
def test_anything_else_is_left_as_it_is(given, ends, prepared):
    first_pass(ends, prepared)
    assert given[0].tolist() == FROM_VLLM
