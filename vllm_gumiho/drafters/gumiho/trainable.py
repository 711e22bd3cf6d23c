"""The Gumiho drafter as a trainable torch module.

Source: Gumiho (ICML 2025, arXiv 2503.10135), section 3 and Table 5, and the tensor layout of the released
checkpoints: ``fc``, ``layers.{i}`` (Llama decoder layers, layer 0 without input norm) and
``mlp.{head}.{stage}.linear``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_gumiho.checkpoint.tensors import D2T
from vllm_gumiho.drafters.checkpoints import save_speculators
from vllm_gumiho.drafters.gumiho.layout import HEAD_STAGES
from vllm_gumiho.drafters.trainable_layers import DrafterConfig, SerialDrafter


class Stage(nn.Module):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)


class GumihoDrafter(SerialDrafter):
    """``fc``, the serial Transformer and the parallel MLP heads; state-dict names are the released ones."""

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
        save_speculators(folder, tensors, verifier, self.config.layer_config())
