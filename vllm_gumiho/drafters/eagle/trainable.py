"""EAGLE-1 as a trainable torch module: one decoder layer that drafts every token serially."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_gumiho.drafters.checkpoints import write_checkpoint
from vllm_gumiho.drafters.trainable_layers import DrafterConfig, SerialDrafter


class EagleDrafter(SerialDrafter):
    """``fc`` without a bias, and one layer."""

    @staticmethod
    def config_for(target: Any, num_layers: int, num_serial_steps: int, num_heads: int) -> DrafterConfig:
        """Sizes for a target: as many tokens a draft as the other settings would give, each a pass of one layer."""
        return DrafterConfig.of_target(target, 1, num_serial_steps + num_heads, 0, fc_bias=False)

    def save(self, folder: Path, tensors: dict[str, Tensor], verifier: str, vocabulary: Tensor | None) -> None:
        """Write the trained ``tensors`` (``fc.weight`` and the layer) as vLLM's own method ``eagle`` reads them."""
        c = self.config
        sizes = {"head_dim": c.head_dim, "num_hidden_layers": c.num_layers}
        write_checkpoint(folder, tensors, {"architectures": ["LlamaForCausalLM"], **c.layer_config(), **sizes})
