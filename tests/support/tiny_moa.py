"""Tiny random Mixture of Attentions checkpoints, and what a target's layers hold of a text."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from reference_moa import ReferenceMoa
from safetensors.torch import load_file
from torch import Tensor

from vllm_gumiho.drafters.moa.layout import LayerShape
from vllm_gumiho.drafters.moa.trainable import MoaConfig, MoaDrafter

# Of a target of four layers: its embedding, an inner state, and the last one before the final norm.
LAYERS = (0, 2, 4)
TARGET_LAYERS = 4


def config(hidden_size: int = tiny.HIDDEN, layers: tuple[int, ...] = LAYERS, vocab_size: int = tiny.VOCAB) -> MoaConfig:
    """The layer self-attention has another head size than the draft layers."""
    shape = LayerShape(hidden_size, 40, 4, 2, 16, layers)
    sizes = {"hidden_size": hidden_size, "num_layers": 2, "num_serial_steps": 1, "num_heads": 0, "fc_bias": False}
    return MoaConfig(tiny.drafter_config(**sizes, vocab_size=vocab_size), shape)


def drafter(seed: int = 0, **changes) -> MoaDrafter:
    """Random and strong everywhere, so that every draft hangs on each feature and each token."""
    torch.manual_seed(seed)
    made = MoaDrafter(config(**changes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(1.0, 0.2) if parameter.ndim == 1 else parameter.normal_(std=0.15)
    return made


def tensors(seed: int = 0, **changes) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in drafter(seed, **changes).state_dict().items()}


def write(folder: Path, target: str = "org/target", seed: int = 0, **changes) -> Path:
    """In the speculators layout."""
    made = drafter(seed, **changes)
    made.save(folder, tensors(seed, **changes), target, None)
    return folder


def reference(target: Path, checkpoint: Path, **changes) -> ReferenceMoa:
    """Of a tiny target and checkpoint."""
    made, theirs = config(**changes), load_file(target / "model.safetensors")
    draft, shape = made.draft, made.layers
    return ReferenceMoa(
        weights=load_file(checkpoint / "model.safetensors"),
        embed=theirs["model.embed_tokens.weight"],
        lm_head=theirs["lm_head.weight"],
        num_heads=draft.num_attention_heads,
        num_kv_heads=draft.num_key_value_heads,
        head_dim=draft.head_dim,
        layer_heads=shape.num_heads,
        layer_kv_heads=shape.num_key_value_heads,
        layer_head_dim=shape.head_dim,
        rope_theta=draft.rope_theta,
        eps=draft.rms_norm_eps,
        layers=tuple(shape.target_layers),
    )


class TargetStates:
    """States of a target by another implementation: ``states(tokens) [T, m, H]``, at the input of each layer named.

    Layer number L of a target of L layers is the state after its last layer, before the final norm.
    """

    def __init__(self, target: Path, layers: tuple[int, ...] = LAYERS):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        self.layers = layers
        self.last: Tensor | None = None
        self.model.model.layers[-1].register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, given: tuple, out: Tensor | tuple) -> None:
        self.last = out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def states(self, tokens: list[int]) -> Tensor:
        held = self.model.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        assert self.last is not None
        inputs = [*held[:-1], self.last.view(1, len(tokens), -1)]
        return torch.stack([inputs[layer][0] for layer in self.layers], dim=1)
