"""Keys and values of all of a target's layers, made again from the states at the layers' inputs.

Source: Mixture of Attentions (arXiv 2410.03804), whose layer self-attention reads what a cache holds: keys after the
rotary embedding, and values.  vLLM's caches lie in another order for each backend, are split over ranks and may be
FP8.  The states are whole everywhere, and the target's own modules make of them what its pass made.

Shapes: N tokens, L layers, G key heads of all ranks, D their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

from vllm_gumiho.errors import DraftModelError


class TargetKeys:
    """Reads a loaded target's input norms, projections, key norms and rotary embedding; copies none of them.

    No torch module: what it reads is the target's, and none of the draft's parameters.
    """

    def __init__(self, target: nn.Module):
        """Raises: DraftModelError for a target that serves LoRA adapters, whose part in keys is their request's.

        And for one whose weights are on the device in its own pass alone.
        """
        self.layers: list[Any] = list(target.model.layers)
        if any(hasattr(layer.self_attn.qkv_proj, "base_layer") for layer in self.layers):
            raise DraftModelError(
                "MoA makes the target's keys and values again, which differ with each LoRA adapter; serve without "
                "enable_lora, or use a checkpoint that reads states (it has state_norms)"
            )
        # vLLM's weight offloading puts a forward of its own into a layer whose weights it moves about.
        if any("forward" in vars(layer) for layer in self.layers):
            raise DraftModelError(
                "MoA makes the target's keys and values again, by weights that vLLM's offloading has on the device in "
                "the target's own pass alone; serve without offload_group_size and cpu_offload_gb, or use a "
                "checkpoint that reads states (it has state_norms)"
            )
        attention = self.layers[0].self_attn
        ranks = get_tensor_model_parallel_world_size()
        # Where ranks are more than key heads, each head is on several that follow one another.
        self.copies = max(1, ranks // attention.total_num_kv_heads)
        width = attention.q_size + 2 * attention.kv_size
        # Of one token: a norm, its projections and their turned copies, in one layer, and what is gathered of all.
        gathered = 2 * attention.total_num_kv_heads * self.copies * attention.head_dim
        self.elements_of_token = attention.hidden_size + 3 * width + 3 * len(self.layers) * gathered

    def __call__(self, states: Sequence[Tensor], positions: Tensor) -> Tensor:
        """States ``[N, H]`` at each layer's input, positions ``[N]`` -> ``[N, L, 2 G D]``, key and value by head.

        Every rank gives the same rows and gets all heads.
        """
        held = [self._of_layer(*each, positions) for each in zip(self.layers, states, strict=True)]
        heads = torch.stack(held, dim=1)
        if get_tensor_model_parallel_world_size() > 1:
            heads = tensor_model_parallel_all_gather(heads, dim=2)[:, :, :: self.copies]
        return heads.flatten(2)

    @staticmethod
    def _of_layer(layer: Any, state: Tensor, positions: Tensor) -> Tensor:
        """``[N, heads of this rank, 2 D]``."""
        attention = layer.self_attn
        fused, _ = attention.qkv_proj(layer.input_layernorm(state))
        key, value = fused[:, attention.q_size :].split(attention.kv_size, dim=-1)
        key = key.unflatten(-1, (-1, attention.head_dim)).contiguous()
        if hasattr(attention, "k_norm"):
            key = attention.k_norm(key)
        key, _ = attention.rotary_emb(positions, key.flatten(1), None)
        return torch.cat([x.unflatten(-1, (-1, attention.head_dim)) for x in (key, value)], dim=-1)
