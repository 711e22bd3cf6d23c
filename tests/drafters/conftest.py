"""LM heads of vLLM's, for the tests of drafting by them."""

from __future__ import annotations

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_gumiho.drafters.lm_head import GreedyArgmax, LmHeadShard


@pytest.fixture
def lm_head() -> ParallelLMHead:
    with set_current_vllm_config(VllmConfig()):
        head = ParallelLMHead(100, 16, params_dtype=torch.float32, disable_tp=True)
    head.weight_loader(head.weight, torch.randn(100, 16))
    return head


@pytest.fixture
def tokens(lm_head) -> GreedyArgmax:
    lm_head.quant_method.process_weights_after_loading(lm_head)
    return GreedyArgmax(LmHeadShard.of(lm_head, 100))
