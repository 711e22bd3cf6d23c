"""What trainable drafters share: sizes, Llama decoder layers, and a serial Transformer over the target's features.

The target's embedding and LM head are frozen inputs, never parameters.

Shapes: N tokens of packed sequences end to end, A of them anchors, H hidden size, S serial steps, n heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_gumiho.drafters.target_config import (
    THETA,
    head_dim_of,
    intermediate_size_of,
    kv_heads_of,
    norm_eps_of,
    rope_of,
)


@dataclass(frozen=True)
class DrafterConfig:
    """Sizes of a drafter; all but the last five are the target's own; `vocab_size` is only passed on.

    target_layers: whose states the first serial step reads, ascending; none where it reads the last feature.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    vocab_size: int
    num_layers: int = 2
    num_serial_steps: int = 2
    num_heads: int = 5
    fc_bias: bool = True
    target_layers: tuple[int, ...] = ()

    @property
    def max_draft_tokens(self) -> int:
        """K of a full draft."""
        return self.num_serial_steps + self.num_heads

    @staticmethod
    def of_target(target: Any, num_layers: int, num_serial_steps: int, num_heads: int, fc_bias: bool) -> DrafterConfig:
        """Draft layers of the target's own shape.  target: its Hugging Face text config."""
        return DrafterConfig(
            hidden_size=target.hidden_size,
            intermediate_size=intermediate_size_of(target),
            num_attention_heads=target.num_attention_heads,
            num_key_value_heads=kv_heads_of(target),
            head_dim=head_dim_of(target),
            rope_theta=float(rope_of(target).get("rope_theta", THETA)),
            rms_norm_eps=norm_eps_of(target),
            vocab_size=target.vocab_size,
            num_layers=num_layers,
            num_serial_steps=num_serial_steps,
            num_heads=num_heads,
            fc_bias=fc_bias,
        )

    def layer_config(self) -> dict[str, Any]:
        """Llama config of the draft layers, as checkpoints carry it."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "vocab_size": self.vocab_size,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class Sight(Protocol):
    """Which keys the queries of a pass attend to; see `vllm_gumiho.training.attention`."""

    anchor_index: Tensor

    def attend(self, q: Tensor, past: list[tuple[Tensor, Tensor]], all_queries: bool) -> Tensor: ...


@dataclass(frozen=True)
class Pass:
    """One pass of the layers over n inputs: cos and sin of their positions, ``[n, 1, D/2]``, and what they see.

    later: a serial step after the first, whose inputs are anchors.
    """

    cos: Tensor
    sin: Tensor
    sight: Sight
    later: bool = False

    @staticmethod
    def at(positions: Tensor, c: DrafterConfig, sight: Sight, later: bool = False) -> Pass:
        """positions ``[n]``: rotary positions."""
        half = c.head_dim // 2
        inv_freq = c.rope_theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
        angle = positions[:, None, None].float() * inv_freq
        return Pass(angle.cos(), angle.sin(), sight, later)

    def rotate(self, x: Tensor, only: Tensor | None = None) -> Tensor:
        """Rotary embedding, half-split layout.  x ``[n, heads, D]``; only: places among the inputs, None for all."""
        cos, sin = (y if only is None else y[only] for y in (self.cos.to(x.dtype), self.sin.to(x.dtype)))
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, c: DrafterConfig):
        super().__init__()
        self.c = c
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, at: Pass, past: list[tuple[Tensor, Tensor]], only: Tensor | None) -> Tensor:
        """x ``[n, H]``; only: places of the queries, None for all.  Appends this pass's keys to ``past``."""

        def split(y: Tensor) -> Tensor:
            return y.view(y.shape[0], y.shape[1] // self.c.head_dim, self.c.head_dim)

        past.append((at.rotate(split(self.k_proj(x))), split(self.v_proj(x))))
        q = at.rotate(split(self.q_proj(x if only is None else x[only])), only)
        out = at.sight.attend(q, past, all_queries=only is None and not at.later)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    def __init__(self, c: DrafterConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: DrafterConfig, has_input_norm: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps) if has_input_norm else nn.Identity()
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, at: Pass, past: list[tuple[Tensor, Tensor]], only: Tensor | None = None) -> Tensor:
        """x ``[n, H]``; only: places of the outputs that are wanted, None for all."""
        attended = self.self_attn(self.input_layernorm(x), at, past, only)
        x = (x if only is None else x[only]) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class SerialDrafter(nn.Module):
    """``fc`` and a serial Transformer, layer 0 without an input norm; no final norm.  Heads are a subclass's."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.config = c = config
        self.fc = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=c.fc_bias)
        self.layers = nn.ModuleList(Layer(c, has_input_norm=i > 0) for i in range(c.num_layers))

    @torch.no_grad()
    def init_weights(self, feature_scale: float, embed_scale: float) -> None:
        """Start as the identity on the target's feature: ``fc = [small | I]``, small residual branches.

        feature_scale, embed_scale: root mean squares of the target's features and embeddings; the embedding
        half is scaled so that a token moves the fused vector by a fifth of a feature.
        """
        c = self.config
        nn.init.normal_(self.fc.weight[:, : c.hidden_size], std=0.2 * feature_scale / embed_scale / c.hidden_size**0.5)
        self.fc.weight[:, c.hidden_size :].copy_(torch.eye(c.hidden_size))
        if c.fc_bias:
            nn.init.zeros_(self.fc.bias)
        for layer in self.layers:
            for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                nn.init.normal_(proj.weight, std=c.hidden_size**-0.5)
            nn.init.normal_(layer.self_attn.o_proj.weight, std=0.02)
            nn.init.normal_(layer.mlp.gate_proj.weight, std=c.hidden_size**-0.5)
            nn.init.normal_(layer.mlp.up_proj.weight, std=c.hidden_size**-0.5)
            nn.init.normal_(layer.mlp.down_proj.weight, std=0.02)
        first = self.layers[0].self_attn
        for proj in (first.q_proj, first.k_proj):
            proj.weight.div_(feature_scale)

    @torch.no_grad()
    def init_from_target(self, layers: nn.ModuleList) -> None:
        """Start from the target's own last decoder layers and ``fc = [0 | I]``.

        The target's layers work on a residual stream far larger than the features they get here; kept for comparison.
        """
        c = self.config
        self.fc.weight.zero_()
        self.fc.weight[:, c.hidden_size :].copy_(torch.eye(c.hidden_size))
        for mine, theirs in zip(self.layers, layers[-c.num_layers :], strict=True):
            state = theirs.state_dict()
            mine.load_state_dict({name: state[name] for name in mine.state_dict()})

    def first_features(self, held: Tensor) -> Tensor:
        """What the first serial step reads, ``[N, H]``, of what the target holds of each token: its feature."""
        return held

    def fuse(self, embeds: Tensor, features: Tensor) -> Tensor:
        """``o = fc(cat[E[x], h])``, embedding first.  ``[..., H]``, ``[..., H]`` -> ``[..., H]``."""
        return self.fc(torch.cat((embeds, features), dim=-1))

    def serial(self, o: Tensor, at: Pass, past: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
        """Run the decoder layers on fused inputs ``[n, H]``; ``past[layer]`` collects keys and values.

        Returns ``[A, H]``, of the anchors alone: other tokens of the first pass need no more of the last layer than
        their keys and values.
        """
        x, last = o, len(self.layers) - 1
        for i, (layer, layer_past) in enumerate(zip(self.layers, past, strict=True)):
            x = layer(x, at, layer_past, at.sight.anchor_index if i == last and not at.later else None)
        return x

    def heads(self, m: Tensor) -> Tensor:
        """Features of all heads on ``m [N, S*H]`` -> ``[n, N, H]``."""
        return m.new_empty(0, m.shape[0], self.config.hidden_size)

    def serial_parameters(self) -> Iterator[nn.Parameter]:
        """Of ``fc`` and the Transformer."""
        yield from self.fc.parameters()
        yield from self.layers.parameters()

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Of the heads."""
        yield from ()

    def fitted_parameters(self) -> Iterator[nn.Parameter]:
        """Those that a start in closed form gives: of ``fc``."""
        yield from self.fc.parameters()
