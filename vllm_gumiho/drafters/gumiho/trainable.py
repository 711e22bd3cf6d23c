"""The Gumiho drafter as a trainable torch module.

Source: Gumiho (ICML 2025, arXiv 2503.10135), section 3 and Table 5, and the tensor layout of the released
checkpoints: ``fc``, ``layers.{i}`` (Llama decoder layers, layer 0 without input norm) and
``mlp.{head}.{stage}.linear``; ``state_norms.{layer}`` and ``combine`` where the first step reads inner layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_gumiho.checkpoint.tensors import D2T
from vllm_gumiho.drafters.checkpoints import save_speculators
from vllm_gumiho.drafters.gumiho import GUMIHO, LAYERED_GUMIHO
from vllm_gumiho.drafters.gumiho.layout import HEAD_STAGES
from vllm_gumiho.drafters.protocol import Drafter
from vllm_gumiho.drafters.trainable_layers import DrafterConfig, RMSNorm, SerialDrafter


class Stage(nn.Module):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)


class GumihoDrafter(SerialDrafter):
    """``fc``, the serial Transformer and the parallel MLP heads; state-dict names are the released ones."""

    entry: Drafter = GUMIHO

    def __init__(self, config: DrafterConfig):
        super().__init__(config)
        c = config
        self.mlp = nn.ModuleList(
            nn.ModuleList(
                Stage(c.hidden_size * (c.num_serial_steps if j == 0 else 1), c.hidden_size) for j in range(HEAD_STAGES)
            )
            for _ in range(c.num_heads)
        )

    @staticmethod
    def config_for(target: Any, num_layers: int, num_serial_steps: int, num_heads: int) -> DrafterConfig:
        """Sizes for a target, given by its Hugging Face text config."""
        return DrafterConfig.of_target(target, num_layers, num_serial_steps, num_heads, fc_bias=True)

    def heads(self, m: Tensor) -> Tensor:
        """All heads on ``m [N, S*H]`` -> ``[n, N, H]`` (paper Table 5: six linears, SiLU, residual from the second)."""
        out = []
        for head in self.mlp:
            z = F.silu(head[0].linear(m))
            for stage in list(head)[1:]:
                z = z + F.silu(stage.linear(z))
            out.append(z)
        return torch.stack(out) if out else super().heads(m)

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Of the heads."""
        return self.mlp.parameters()

    def save(self, folder: Path, tensors: dict[str, Tensor], verifier: str, vocabulary: Tensor | None) -> None:
        """Write the trained ``tensors`` in the speculators layout.

        verifier: the target.  vocabulary: ids that may be drafted, ascending; None for all.
        """
        if vocabulary is not None:
            tensors = {**tensors, D2T: vocabulary.cpu() - torch.arange(vocabulary.numel())}
        save_speculators(folder, tensors, verifier, self.config.layer_config(), drafter=self.entry)


class LayeredGumihoDrafter(GumihoDrafter):
    """Gumiho whose first serial step reads a feature made of several layers' states; later steps are as they are.

    The feature has the place and the size of the target's last one, and meets the same ``fc``: what drafts need not
    know which pass it is in.
    """

    entry = LAYERED_GUMIHO

    def __init__(self, config: DrafterConfig):
        super().__init__(config)
        c = config
        self.state_norms = nn.ModuleDict({str(i): RMSNorm(c.hidden_size, c.rms_norm_eps) for i in c.target_layers})
        self.combine = nn.Linear(len(c.target_layers) * c.hidden_size, c.hidden_size)

    @staticmethod
    def config_for(  # type: ignore[override]
        target: Any, num_layers: int, num_serial_steps: int, num_heads: int, layers: tuple[int, ...]
    ) -> DrafterConfig:
        """Sizes for a target, given by its Hugging Face text config, whose states of these layers are read."""
        config = DrafterConfig.of_target(target, num_layers, num_serial_steps, num_heads, fc_bias=True)
        return replace(config, target_layers=tuple(sorted(layers)))

    @torch.no_grad()
    def init_weights(self, feature_scale: float, embed_scale: float) -> None:
        """As the base class; the last layer read passes through as a feature, the others are left out."""
        super().init_weights(feature_scale, embed_scale)
        nn.init.zeros_(self.combine.bias)
        nn.init.zeros_(self.combine.weight)
        last = self.combine.weight[:, -self.config.hidden_size :]
        last.copy_(feature_scale * torch.eye(self.config.hidden_size))

    def normed(self, held: Tensor) -> Tensor:
        """States behind the target's feature, ``[N, H + m * H]``, each normalised -> ``[N, m * H]``."""
        states = held[..., self.config.hidden_size :].unflatten(-1, (len(self.state_norms), -1)).unbind(-2)
        return torch.cat([norm(state) for norm, state in zip(self.state_norms.values(), states, strict=True)], dim=-1)

    def first_features(self, held: Tensor) -> Tensor:
        """``[N, H + m * H]``, the target's feature and its states of the layers -> ``[N, H]``."""
        return self.combine(self.normed(held))

    def serial_parameters(self) -> Iterator[nn.Parameter]:
        """Of what makes a feature of the layers, ``fc`` and the Transformer."""
        yield from self.state_norms.parameters()
        yield from self.combine.parameters()
        yield from super().serial_parameters()

    def fitted_parameters(self) -> Iterator[nn.Parameter]:
        """Of ``fc``, and of what makes a feature of the layers."""
        yield from super().fitted_parameters()
        yield from self.state_norms.parameters()
        yield from self.combine.parameters()
