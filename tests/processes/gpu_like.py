"""vLLM's operators as a GPU's behave, for engines on a CPU: `turn_on` before an engine is made.

On a CPU every operator is functional, so a draft that reads memory which vLLM may write is right there and wrong on a
GPU.  Source: vLLM 0.32's CUDA operators: ``fused_add_rms_norm`` writes both its inputs, ``vocab_parallel_embedding``
takes contiguous ids only.
"""

from __future__ import annotations

from typing import Any

CALLS = {"fused norms": 0, "embeddings": 0}
# Requests at once that the heads have drafted for at the most.
MOST = {"heads": 0}


def turn_on() -> None:
    """For this process and the engines made in it from now on."""
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    from vllm_gumiho.drafters.gumiho.heads import ParallelHeads

    norm, embed, heads = RMSNorm.forward_native, VocabParallelEmbedding.forward, ParallelHeads.forward

    def in_place_norm(self: Any, x: Any, residual: Any = None) -> Any:
        if residual is None:
            return norm(self, x)
        CALLS["fused norms"] += 1
        normed, added = norm(self, x.clone(), residual.clone())
        return x.copy_(normed), residual.copy_(added)

    def contiguous_embedding(self: Any, input_: Any) -> Any:
        CALLS["embeddings"] += 1
        if not input_.is_contiguous():
            raise RuntimeError("vocab_parallel_embedding: input_ids must be contiguous")
        return embed(self, input_)

    def counted_heads(self: Any, m: Any, count: int) -> Any:
        MOST["heads"] = max(MOST["heads"], len(m[-1]))
        return heads(self, m, count)

    ParallelHeads.forward = counted_heads
    RMSNorm.forward_native = in_place_norm
    VocabParallelEmbedding.forward = contiguous_embedding
