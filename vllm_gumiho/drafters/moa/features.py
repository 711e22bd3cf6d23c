"""From what the target's layers hold of a token to one feature: layer self-attention, mean, linear map.

Source: Mixture of Attentions (arXiv 2410.03804), layer self-attention; the same module trains and serves.

Shapes: N tokens, m layers read, W their width, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_gumiho.drafters.moa.layers import AttentionLayer
from vllm_gumiho.drafters.moa.layout import LayerShape
from vllm_gumiho.drafters.target_layers import chunk_bytes
from vllm_gumiho.drafters.trainable_layers import DrafterConfig, RMSNorm


class LayerFeatures(nn.Module):
    """``state_norms``, ``layer_self_attention`` and ``Ekv2E``; state-dict names are the checkpoint's."""

    def __init__(
        self, shape: LayerShape, hidden_size: int, rope_theta: float, rms_norm_eps: float, num_layers: int | None = None
    ):
        """num_layers: of the target, where all are read."""
        super().__init__()
        config = DrafterConfig(
            hidden_size=shape.width,
            intermediate_size=shape.intermediate_size,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            rope_theta=rope_theta,
            rms_norm_eps=rms_norm_eps,
            vocab_size=0,
        )
        self.target_layers = tuple(shape.target_layers)
        self.num_layers = len(self.target_layers) or num_layers or 0
        # A buffer, as a tensor made of a list in each pass would have a GPU wait for the host.
        places = torch.tensor([self.target_layers or list(range(self.num_layers))])
        self.register_buffer("places", places, persistent=False)
        self.state_norms = nn.ModuleDict({str(i): RMSNorm(shape.width, rms_norm_eps) for i in self.target_layers})
        self.layer_self_attention = AttentionLayer(config)
        self.Ekv2E = nn.Linear(shape.width, hidden_size)
        # Of one layer of one token: the stream and its norms, q, k, v and their turned copies, the MLP's inside.
        heads = shape.num_heads + shape.num_key_value_heads
        self.elements_of_state = 4 * shape.width + 4 * heads * shape.head_dim + 3 * shape.intermediate_size

    def forward(self, held: Tensor) -> Tensor:
        """``[N, m, W]`` -> ``[N, H]``, token by token; layers are places on the rotary embedding by their number."""
        if self.target_layers:
            norms = (self.state_norms[str(layer)] for layer in self.target_layers)
            held = torch.stack([norm(held[:, i]) for i, norm in enumerate(norms)], dim=1)
        mixed = self.layer_self_attention(held, self.places, held, self.places)
        return self.Ekv2E(mixed.mean(1))

    def chunk(self, elements: int, element_size: int, ranks: int) -> int:
        """Tokens of which no more than `chunk_bytes` are alive at a time.

        elements: of a token, beside those of the layer attention.  ranks: among which a chunk's tokens are shared out.
        """
        of_token = self.num_layers * self.elements_of_state / ranks + elements
        return max(1, int(chunk_bytes(self.places.device) / (of_token * element_size)))
