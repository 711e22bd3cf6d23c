"""The parallel MLP heads: ``m [B, S*H]`` -> ``z [n, B, H]``."""

from vllm_gumiho.kernels.parallel_heads.batched import parallel_heads_batched
from vllm_gumiho.kernels.parallel_heads.reference import HEAD_STAGES, HeadWeights, parallel_heads_reference

__all__ = ["HEAD_STAGES", "HeadWeights", "parallel_heads_batched", "parallel_heads_reference"]
