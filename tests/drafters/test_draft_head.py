"""The LM head's rows of a draft vocabulary: which heads have rows to take, and in which types they meet features."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_gumiho.drafters.lm_head import DraftHead
from vllm_gumiho.drafters.target_owned import TargetHead
from vllm_gumiho.errors import CheckpointError

IDS = torch.tensor([1, 4, 6])


def lm_head(dtype=torch.float32, method=UnquantizedEmbeddingMethod, **more) -> SimpleNamespace:
    places = SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=8, num_added_elements=0)
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    made = {"weight": weight, "shard_indices": places, "tp_size": 1, "quant_method": method.__new__(method)}
    return SimpleNamespace(**(made | more))


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        # An LM head of its own in eight bits, and what vLLM 0.33 makes of one with draft_lm_head_quantization.
        (lm_head(torch.float8_e4m3fn, Fp8LinearMethod), "quantised or wrapped"),
        (lm_head(torch.int8, Fp8LinearMethod), "quantised or wrapped"),
        (lm_head(bias=torch.zeros(8)), "has a bias"),
        (lm_head(weight=None), "quantised or wrapped"),
    ],
)
def test_a_head_without_plain_rows_is_refused(head, reason):
    with pytest.raises(CheckpointError, match=f"CKPT: has a reduced draft vocabulary.*{reason}.*whole vocabulary"):
        DraftHead(head, IDS, "CKPT")


@pytest.mark.parametrize("method", [UnquantizedEmbeddingMethod, UnquantizedLinearMethod])
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_features_of_another_type_meet_the_rows(weights, features, method):
    """A float32 ``head_dtype`` beside a bfloat16 draft model."""
    head = lm_head(weights, method)
    draft = DraftHead(head, IDS, "CKPT")
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).to(features)
    logits = draft.spread(draft.draft_logits(x), 8)
    assert logits.dtype == weights
    torch.testing.assert_close(logits[:, IDS], x.to(weights) @ head.weight[IDS].T, rtol=2e-2, atol=2e-2)
    assert logits[:, [0, 2, 3, 5, 7]].eq(-torch.inf).all()


@pytest.mark.parametrize("eight_bit", [None, torch.int8])
@pytest.mark.parametrize("head_dtype", [None, torch.bfloat16, torch.float32])
def test_logits_have_the_type_of_the_runners_buffers(head_dtype, eight_bit):
    """``head_dtype`` of the engine, which may be wider than the draft model."""
    drafter = TargetHead()
    drafter.draft_head = DraftHead(lm_head(torch.bfloat16), IDS, "CKPT", eight_bit)
    drafter.logits_processor = SimpleNamespace(head_dtype=head_dtype, soft_cap=None, scale=0.5)
    drafter.config = SimpleNamespace(vocab_size=8)
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    logits = drafter.compute_logits(x)
    assert logits.dtype == (head_dtype or torch.bfloat16)
    assert torch.equal(logits[:, IDS].bfloat16(), drafter.draft_head.draft_logits(x) * 0.5)
