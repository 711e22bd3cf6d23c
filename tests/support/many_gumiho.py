"""Gumiho's equations for many drafts of a text in one pass, with the tensors of a checkpoint and its target."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reference_drafter import ReferenceDrafter
from safetensors.torch import load_file
from torch import Tensor

from vllm_gumiho.drafters.draft_weights import DraftWeights
from vllm_gumiho.kernels.eight_bit import dequantise_rows, quantise_rows

AS_GIVEN = DraftWeights()


@dataclass
class ManyDrafts(ReferenceDrafter):
    """The equations of `ReferenceDrafter` for many drafts of a text in one pass, whatever the number of serial steps.

    allowed ``[V]`` bool: tokens of a draft vocabulary.  bias, scale, soft_cap: of the target's logits.
    """

    num_serial_steps: int = 2
    allowed: Tensor | None = None
    bias: Tensor | float = 0.0
    scale: float = 1.0
    soft_cap: float | None = None

    def read(self, model: Any, tokens: Tensor) -> Tensor:
        """Features of transformers' target on a text, ``[T, H]``."""
        return model.model(tokens[None]).last_hidden_state[0]

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """x ``[N, heads, D]`` at ``positions [N]``: pairs (i, i + D/2) turned by position * theta^(-2i/D)."""
        half = self.head_dim // 2
        frequencies = self.rope_theta ** (-2 * torch.arange(half, dtype=torch.float64) / self.head_dim)
        angles = positions[:, None].double() * frequencies
        cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def masked_layer(self, x: Tensor, index: int, positions: Tensor, seen: Tensor) -> Tensor:
        at = f"layers.{index}."
        y = x if index == 0 else self.norm(x, f"{at}input_layernorm.weight")

        def project(name: str, heads: int) -> Tensor:
            return self.product(y, f"{at}self_attn.{name}.weight").view(len(y), heads, self.head_dim)

        q = self.rotated(project("q_proj", self.num_heads), positions)
        k = self.rotated(project("k_proj", self.num_kv_heads), positions)
        shared = torch.arange(self.num_heads) * self.num_kv_heads // self.num_heads
        scores = torch.einsum("qhd,khd->hqk", q, k[:, shared]) / self.head_dim**0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, project("v_proj", self.num_kv_heads)[:, shared])
        x = x + self.product(mixed.flatten(1), f"{at}self_attn.o_proj.weight")
        y = self.norm(x, f"{at}post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(self.product(y, f"{at}mlp.gate_proj.weight"))
        up = self.product(y, f"{at}mlp.up_proj.weight")
        return x + self.product(gate * up, f"{at}mlp.down_proj.weight")

    def logits(self, tokens: Tensor, features: Tensor, lengths: Tensor, drafted: Tensor) -> Tensor:
        """Draft logits ``[D, K, V]``; arguments as `states` has them."""
        return self.head_logits(self.states(tokens, features, lengths, drafted))

    def head_logits(self, states: Tensor) -> Tensor:
        """``[..., H]`` -> ``[..., V]``, minus infinity for what is never drafted."""
        found = (self.product(states, "lm_head") + self.bias) * self.scale
        if self.soft_cap is not None:
            found = self.soft_cap * torch.tanh(found / self.soft_cap)
        return found if self.allowed is None else found.masked_fill(~self.allowed, -torch.inf)

    def states(self, tokens: Tensor, features: Tensor, lengths: Tensor, drafted: Tensor) -> Tensor:
        """What the LM head drafts from, ``[D, K, H]``, after the first ``lengths [D]`` tokens of a text.

        tokens ``[T + 1]``, features ``[T, H]`` of the target.  drafted ``[D, K]``: serial tokens that later steps go on
        from, so that one difference does not make all behind it differ.
        """
        text = self.fuse(tokens[1:], features)
        count, anchors = len(text), lengths - 2
        nodes, positions = [text], [torch.arange(count)]
        layers = len({name.split(".")[1] for name in self.weights if name.startswith("layers.")})
        hidden, own = [], []
        for step in range(min(self.num_serial_steps, drafted.shape[1])):
            x, where = torch.cat(nodes), torch.cat(positions)
            owner = torch.cat((torch.full((count,), -1), torch.arange(len(anchors)).repeat(step)))
            # A row of the text sees the text up to itself; a drafted one what its draft saw, and that draft's own.
            newest = torch.cat((torch.arange(count), anchors.repeat(step)))
            in_text = (owner == -1)[None] & (where[None] <= newest[:, None])
            seen = in_text | ((owner[None] == owner[:, None]) & (owner != -1)[None] & (where[None] <= where[:, None]))
            for index in range(layers):
                x = self.masked_layer(x, index, where, seen)
            hidden.append(x[anchors] if step == 0 else x[-len(anchors) :])
            own.append(self.fuse(drafted[:, step], hidden[-1]))
            nodes.append(own[-1])
            positions.append(anchors + step + 1)
        count_heads = drafted.shape[1] - self.num_serial_steps
        heads = [self.head(torch.cat(own, dim=-1), index) for index in range(max(0, count_heads))]
        return torch.stack((*hidden, *heads), dim=1)


@dataclass
class ManyLayered(ManyDrafts):
    """Of a drafter whose first serial step reads states of target layers, ``[T, m, H]`` where a feature is taken."""

    layers: tuple[int, ...] = ()

    def read(self, model: Any, tokens: Tensor) -> Tensor:
        from tiny_moa import TargetStates

        return TargetStates(model, self.layers).states(tokens.tolist())

    def states(self, tokens: Tensor, features: Tensor, lengths: Tensor, drafted: Tensor) -> Tensor:
        # An engine gives them side by side.
        states = features.view(len(features), len(self.layers), -1)
        return super().states(tokens, self.first_features(states), lengths, drafted)


# What checkpoints call the embedding and the LM head.
EMBEDDINGS = (
    "model.embed_tokens.weight", "model.language_model.embed_tokens.weight", "model.decoder.embed_tokens.weight",
    "transformer.wte.weight", "gpt_neox.embed_in.weight",
)  # fmt: skip
HEADS = ("lm_head.weight", "embed_out.weight")


def plain_target(folder: Path) -> Any | None:
    """The target as transformers runs it in float32; None where its weights are quantised."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if getattr(AutoConfig.from_pretrained(folder), "quantization_config", None):
        return None
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def reference_of(
    target: Path, checkpoint: Path, weights: DraftWeights = AS_GIVEN, rounded: frozenset[str] = frozenset()
) -> ManyDrafts:
    """The equations with a checkpoint's tensors; layer settings are its config's, else the target's.

    weights: matrices and LM head are what their 8-bit rows stand for.  rounded: see `ReferenceDrafter`.
    """
    from transformers import AutoConfig

    from vllm_gumiho.checkpoint.tensors import D2T, SCALE
    from vllm_gumiho.drafters.checkpoints import open_checkpoint

    opened, config = open_checkpoint(checkpoint), AutoConfig.from_pretrained(target)
    tensors = {name: tensor.float() for name, tensor in opened.tensors() if name != D2T}
    if weights.dtype is not None:
        kept = dict(opened.rows(weights.dtype))
        for name in [name for name, tensor in kept.items() if tensor.dtype == weights.dtype]:
            tensors[name] = kept[name].float() * kept[name + SCALE]
    places = {name: tensor for name, tensor in opened.tensors() if name == D2T}
    text = config.get_text_config()
    layer = text.to_dict() | dict(opened.layer_config)
    rope = layer.get("rope_parameters") or {}
    assert rope.get("rope_type", "default") == "default", f"no reference for {rope}"
    head_dim = layer.get("head_dim") or layer["hidden_size"] // layer["num_attention_heads"]
    own = load_file(target / "model.safetensors")
    embed = next(own[name] for name in EMBEDDINGS if name in own).float()
    head = next((own[name] for name in HEADS if name in own), embed).float()
    size = text.vocab_size
    bias = own["lm_head.bias"].float() if "lm_head.bias" in own else 0.0
    scale = getattr(text, "logit_scale", None) or 1 / (getattr(text, "logits_scaling", None) or 1.0)
    if text.model_type.startswith("minicpm"):  # scales what its LM head reads
        scale = 1.0
    allowed = None
    if D2T in places:
        allowed = torch.zeros(len(embed), dtype=torch.bool)
        allowed[torch.arange(len(places[D2T])) + places[D2T]] = True
    tensors.setdefault("fc.bias", torch.zeros(embed.shape[1]))
    if weights.head_dtype is not None:
        head = dequantise_rows(quantise_rows(head, weights.head_dtype))
    first = next(tensor for name, tensor in tensors.items() if name == "mlp.0.0.linear.weight")
    layers: tuple[int, ...] = opened.sizes.target_layers  # type: ignore[attr-defined]
    kind = partial(ManyLayered, layers=layers) if layers else ManyDrafts
    return kind(
        weights=tensors,
        embed=embed,
        lm_head=head[:size],
        bias=bias,
        scale=scale,
        soft_cap=getattr(text, "final_logit_softcapping", None),
        num_heads=len(tensors["layers.0.self_attn.q_proj.weight"]) // head_dim,
        num_kv_heads=len(tensors["layers.0.self_attn.k_proj.weight"]) // head_dim,
        head_dim=head_dim,
        rope_theta=float(layer.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        eps=layer["rms_norm_eps"],
        num_serial_steps=first.shape[1] // first.shape[0],
        allowed=allowed,
        rounded=rounded,
    )
