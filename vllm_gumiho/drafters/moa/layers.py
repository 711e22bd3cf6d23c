"""One Llama layer in plain torch, without masks or caches of vLLM's: for the layer self-attention, and for training.

Shapes: R rows, T queries a row, S keys, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_gumiho.drafters.trainable_layers import MLP, DrafterConfig, RMSNorm


def turned(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding, half-split layout.  x ``[R, heads, T, D]``, positions ``[R, T]`` or ``[1, T]``."""
    half = x.shape[-1] // 2
    inv_freq = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[:, None, :, None].float() * inv_freq
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Projections(nn.Module):
    def __init__(self, c: DrafterConfig):
        super().__init__()
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=False)


class AttentionLayer(nn.Module):
    """Queries from one stream, keys and values from another or the same, one norm for both; then the MLP."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Projections(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, positions: Tensor, source: Tensor, source_positions: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """x ``[R, T, W]``, source ``[R, S, W]``, both with positions; mask bool ``[R, 1, T, S]`` -> ``[R, T, W]``."""
        attention, theta = self.self_attn, self.config.rope_theta

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

        query = self.input_layernorm(x)
        key = query if source is x else self.input_layernorm(source)
        q = turned(split(attention.q_proj(query)), positions, theta)
        k = turned(split(attention.k_proj(key)), source_positions, theta)
        mixed = F.scaled_dot_product_attention(q, k, split(attention.v_proj(key)), attn_mask=mask, enable_gqa=True)
        x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))
