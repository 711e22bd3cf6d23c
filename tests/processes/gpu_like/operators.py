"""vLLM's operators as a GPU's behave, for engines on a CPU: `turn_on` before an engine is made.

On a CPU every operator is functional, so a draft that reads memory which vLLM may write is right there and wrong on a
GPU.  Source: vLLM 0.32's CUDA operators: ``fused_add_rms_norm`` writes both its inputs, and so does the all-reduce
fused with it, whatever else holds them; ``vocab_parallel_embedding`` takes contiguous ids only; buffers with a row a
request (watermarking, acceptance) take rows that are requests.
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

    _refuse_rows_that_are_no_requests()
    ParallelHeads.forward = counted_heads
    RMSNorm.forward_native = in_place_norm
    VocabParallelEmbedding.forward = contiguous_embedding


def _refuse_rows_that_are_no_requests() -> None:
    """Of what runner V2 keeps by request; nothing else would tell, as slices of these buffers fit any row count."""
    from vllm.v1.watermarking.spec_decode import DraftWatermarker
    from vllm.v1.worker.gpu.spec_decode.acceptance_estimator import OnlineAcceptanceEstimator

    prepare, sample, predict = DraftWatermarker.prepare, DraftWatermarker.sample, OnlineAcceptanceEstimator.predict

    def counting_prepare(self: Any, contexts: Any, *args: Any) -> None:
        self.requests = len(contexts)
        prepare(self, contexts, *args)

    def strict_sample(self: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self, "requests") and len(logits) != self.requests:
            raise RuntimeError(f"watermarked drafts of {self.requests} requests, in {len(logits)} rows")
        return sample(self, logits, *args, **kwargs)

    def strict_predict(self: Any, logits: Any, idx_mapping: Any, draft_step: Any, *args: Any) -> None:
        slots = [slot for slot in idx_mapping.tolist() if slot >= 0]
        if draft_step.ndim == 0 and len(set(slots)) != len(slots):
            raise RuntimeError(f"confidences of one draft step, of requests {slots}")
        if draft_step.ndim and len(logits) % self.num_speculative_steps:
            raise RuntimeError(f"confidences of whole drafts of {self.num_speculative_steps}, in {len(logits)} rows")
        predict(self, logits, idx_mapping, draft_step, *args)

    DraftWatermarker.prepare, DraftWatermarker.sample = counting_prepare, strict_sample
    OnlineAcceptanceEstimator.predict = strict_predict
