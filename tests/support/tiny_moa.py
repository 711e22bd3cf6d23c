"""Tiny random Mixture of Attentions checkpoints, what a target's layers hold of a text, and what is to be drafted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from vllm_gumiho.drafters.moa.layout import LayerShape
from vllm_gumiho.drafters.moa.reference import ReferenceMoa
from vllm_gumiho.drafters.moa.trainable import MoaConfig, MoaDrafter

LAYERS, TARGET_LAYERS = tiny.LAYERS, tiny.TARGET_LAYERS


def config(hidden_size: int = tiny.HIDDEN, layers: tuple[int, ...] = LAYERS, vocab_size: int = tiny.VOCAB) -> MoaConfig:
    """The layer self-attention has another head size than the draft layers.  No layers: it reads keys and values."""
    draft = tiny.drafter_config(hidden_size=hidden_size)
    width = hidden_size if layers else 2 * draft.num_key_value_heads * draft.head_dim
    shape = LayerShape(width, 40, 4, 2, 16, layers)
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


def write_published(folder: Path, target: Path, **changes) -> Path:
    """In the released layout, for a tiny target: its own config.json, and keys and values as input."""
    config = json.loads((target / "config.json").read_text()) | {"architectures": ["MOASpecLlamaForCausalLM"]}
    return tiny.write_released(folder, tensors(layers=(), **changes), config, "safetensors")


def reference(target: Path, checkpoint: Path, **changes) -> ReferenceMoa:
    """Of a tiny target and checkpoint."""
    theirs = load_file(target / "model.safetensors")
    weights = load_file(checkpoint / "model.safetensors")
    return equations(config(**changes), weights, theirs["model.embed_tokens.weight"], theirs["lm_head.weight"])


def equations(made: MoaConfig, weights: dict[str, Tensor], embed: Tensor, lm_head: Tensor) -> ReferenceMoa:
    """With these tensors, at a drafter's sizes."""
    draft, shape = made.draft, made.layers
    return ReferenceMoa(
        weights=weights,
        embed=embed,
        lm_head=lm_head,
        num_heads=draft.num_attention_heads,
        num_kv_heads=draft.num_key_value_heads,
        head_dim=draft.head_dim,
        layer_heads=shape.num_heads,
        layer_kv_heads=shape.num_key_value_heads,
        layer_head_dim=shape.head_dim,
        rope_theta=draft.rope_theta,
        eps=draft.rms_norm_eps,
        layers=tuple(shape.target_layers) or None,
    )


def _model(target: Path | Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32) if isinstance(target, Path) else target


class TargetStates:
    """States of a target by another implementation: ``states(tokens) [T, m, H]``, at the input of each layer named.

    Layer number L of a target of L layers is the state after its last layer, before the final norm.
    """

    def __init__(self, target: Path | Any, layers: tuple[int, ...] = LAYERS):
        """target: a folder, or transformers' model."""
        self.model = _model(target)
        self.layers = layers
        self.last: Tensor | None = None

    def _keep(self, module: torch.nn.Module, given: tuple, out: Tensor | tuple) -> None:
        self.last = out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def states(self, tokens: list[int]) -> Tensor:
        hook = self.model.model.layers[-1].register_forward_hook(self._keep)
        held = self.model.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        hook.remove()
        assert self.last is not None
        inputs = [*held[:-1], self.last.view(1, len(tokens), -1)]
        return torch.stack([inputs[layer][0] for layer in self.layers], dim=1)


class TargetCache:
    """Keys and values of a target by another implementation: ``states(tokens) [T, L, 2 * heads * D]``."""

    def __init__(self, target: Path | Any):
        """target: a folder, or transformers' model."""
        self.model = _model(target)

    @torch.no_grad()
    def states(self, tokens: list[int]) -> Tensor:
        cache = self.model.model(torch.tensor([tokens]), use_cache=True).past_key_values
        held = [torch.cat((layer.keys[0], layer.values[0]), dim=-1) for layer in cache.layers]  # [heads, T, 2 D]
        return torch.stack([each.transpose(0, 1).flatten(1) for each in held], dim=1)


class Wanted:
    """Drafts by the equations, each text's once."""

    def __init__(self, reference: ReferenceMoa, target: TargetStates | TargetCache):
        self.reference, self.target = reference, target
        self.longest: dict[tuple[int, ...], tuple[list[int], Tensor]] = {}

    def after(self, text: list[int], length: int) -> tuple[list[int], Tensor]:
        """``length`` draft tokens after a text, and what each was drafted from, ``[length, H]``."""
        found = self.longest.get(tuple(text))
        if found is None or len(found[0]) < length:
            found = self.reference.draft(torch.tensor(text), self.target.states(text[:-1]), length)
            self.longest[tuple(text)] = found
        return found[0][:length], found[1][:length]
