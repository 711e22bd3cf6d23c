"""One of two tensor-parallel ranks: ``python shards_main.py RANK PORT OUT.json``.

For several vocabularies: the argmax kernel over the two shards of a real LM head, and what its gathered logits say.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_DIST_IDENT"] = f"shards-{sys.argv[2]}"  # names the shared memory; workers are given it by the engine

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_gumiho.drafters.kernel_check import wrong_tokens
from vllm_gumiho.drafters.lm_head import GreedyArgmax, LmHeadShard
from vllm_gumiho.drafters.ranks import lowest_of_all_ranks
from vllm_gumiho.kernels.lm_head_argmax import launches

HIDDEN = 48
# vLLM pads to 64: shards of 64 + 64, of 64 and 36 with padding, of 20 and nothing.
VOCABULARIES = (128, 100, 20)


def run(vocab: int, rank: int) -> dict:
    torch.manual_seed(vocab)
    whole, rows = torch.randn(vocab, HIDDEN), torch.randn(7, HIDDEN)
    whole[vocab - 1] = whole[3]  # a tie, across the shards where both hold tokens
    rows[0] = 4 * whole[3]
    lm_head = ParallelLMHead(vocab, HIDDEN, params_dtype=torch.float32)
    lm_head.weight_loader(lm_head.weight, whole)
    tokens = GreedyArgmax(LmHeadShard.of(lm_head, vocab))
    lm_head.weight.data[tokens.shard.size :] = 100 * rows[0]  # padding that would win
    lm_head.quant_method.process_weights_after_loading(lm_head)
    before = launches["triton"]
    found = tokens(rows)
    return {
        "shard": [tokens.shard.first, tokens.shard.size],
        "launched": launches["triton"] - before,
        "problem": wrong_tokens(tokens, [1, 5], torch.float32),
        "found": found.tolist(),
        "logits": LogitsProcessor(vocab)(lm_head, rows).argmax(-1).tolist(),
        "whole": (rows @ whole.T).argmax(-1).tolist(),
    }


def main() -> None:
    rank, port, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(2, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        initialize_model_parallel(2)
        result: dict = {str(vocab): run(vocab, rank) for vocab in VOCABULARIES}
        result["lowest"] = lowest_of_all_ranks([rank, 2 - rank])
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
