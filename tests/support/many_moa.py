"""The equations of `ReferenceMoa` for many drafts of a text in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vllm_gumiho.drafters.moa.reference import ReferenceMoa


def pairs_turned(x: Tensor, positions: Tensor, frequencies: list[float]) -> Tensor:
    """x ``[N, heads, D]`` at positions ``[N]``: pairs (i, i + D/2) turned by position * frequency i."""
    angles = positions[:, None].double() * torch.tensor(frequencies, dtype=torch.float64)
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@dataclass
class ManyMoa(ReferenceMoa):
    """allowed ``[V]`` bool: tokens of a draft vocabulary."""

    allowed: Tensor | None = None

    def plain(self, size: int) -> list[float]:
        return [self.rope_theta ** (-2 * i / size) for i in range(size // 2)]

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """q ``[Q, heads, D]`` over k and v ``[S, kv heads, D]``, of which each sees ``seen [Q, S]``."""
        shared = torch.arange(q.shape[1]) * k.shape[1] // q.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, k[:, shared]) / q.shape[-1] ** 0.5
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[:, shared]).flatten(1)

    def layer(
        self, x: Tensor, at: Tensor, source: Tensor, source_at: Tensor, seen: Tensor, name: str, heads: tuple[int, ...]
    ) -> Tensor:
        """A Llama layer of queries x at positions ``at`` over a source.  heads: how many, of keys, their size."""
        count, keys, size = heads
        turn = self.plain(size) if name != "self_attention" else self.self_frequencies or self.plain(size)
        y, f = self.norm(x, f"{name}.input_layernorm"), self.norm(source, f"{name}.input_layernorm")
        q = pairs_turned(self.project(y, f"{name}.self_attn.q_proj", count, size), at, turn)
        k = pairs_turned(self.project(f, f"{name}.self_attn.k_proj", keys, size), source_at, turn)
        v = self.project(f, f"{name}.self_attn.v_proj", keys, size)
        return self.rest(x, self.mixed(q, k, v, seen), name)

    def features(self, held: Tensor) -> Tensor:
        """Of tokens ``[T, H]``, from what the target's layers hold of them, ``[T, m, W]``."""
        count, layers, _ = held.shape
        if self.layers is not None:
            normed = [self.norm(held[:, i], f"state_norms.{layer}") for i, layer in enumerate(self.layers)]
            held = torch.stack(normed, dim=1)
        places = torch.tensor(self.layers or range(layers)).repeat(count)
        token = torch.arange(count).repeat_interleave(layers)
        heads = (self.layer_heads, self.layer_kv_heads, self.layer_head_dim)
        flat, same = held.flatten(0, 1), token[:, None] == token
        mixed = self.layer(flat, places, flat, places, same, "layer_self_attention", heads)
        return mixed.view(count, layers, -1).mean(1) @ self.weights["Ekv2E.weight"].T + self.weights["Ekv2E.bias"]

    def logits(self, tokens: Tensor, held: Tensor, lengths: Tensor, drafted: Tensor) -> Tensor:
        """Draft logits ``[D, K, V]`` after the first ``lengths [D]`` tokens of a text.

        tokens ``[T + 1]``; held ``[T, m, W]``.  drafted ``[D, K]``: tokens that later ones go on from.
        """
        (count, length), rows = drafted.shape, len(tokens) - 1
        draft = torch.arange(count).repeat_interleave(length - 1)
        step = torch.arange(1, length).repeat(count)
        # Nodes of the self-attention: the text's tokens from the second on, then those that are gone on from.
        ids = torch.cat((tokens[1:], drafted[:, :-1].flatten()))
        owner = torch.cat((torch.full((rows,), -1), draft))
        newest = torch.cat((torch.arange(rows), lengths[draft] - 2))
        at = torch.cat((torch.arange(1, rows + 1), lengths[draft] - 1 + step))
        in_text = (owner == -1)[None] & (torch.arange(len(ids))[None] <= newest[:, None])
        own = (owner[None] == owner[:, None]) & (owner != -1)[None] & (at[None] <= at[:, None])
        heads = (self.num_heads, self.num_kv_heads, self.head_dim)
        x = self.embed[ids]
        x = self.layer(x, at, x, at, in_text | own, "self_attention", heads)
        asked = torch.cat((lengths[:, None] - 2, rows + torch.arange(len(draft)).view(count, -1)), dim=1).flatten()
        last = lengths.repeat_interleave(length)
        features = self.features(held)
        seen = torch.arange(rows)[None] < last[:, None] - 1
        out = self.layer(x[asked], at[asked], features, torch.arange(rows), seen, "cross_attention", heads)
        found = (out @ self.lm_head.T).view(count, length, -1)
        return found if self.allowed is None else found.masked_fill(~self.allowed, -torch.inf)

    def read(self, model: Any, tokens: Tensor) -> Tensor:
        """What the layers of transformers' target hold of a text, ``[T, m, W]``."""
        from tiny_moa import TargetCache, TargetStates

        source = TargetCache(model) if self.layers is None else TargetStates(model, self.layers)
        return source.states(tokens.tolist())


def moa_reference_of(target: Path, checkpoint: Path) -> ManyMoa:
    """The equations with a checkpoint's tensors; layer settings are its config's, else the target's."""
    from transformers import AutoConfig

    from vllm_gumiho.checkpoint.tensors import D2T
    from vllm_gumiho.drafters.checkpoints import open_checkpoint

    opened, config = open_checkpoint(checkpoint), AutoConfig.from_pretrained(target)
    tensors = dict(opened.tensors())
    layer = config.to_dict() | dict(opened.layer_config)
    own = load_file(target / "model.safetensors")
    embed, rope, sizes = own["model.embed_tokens.weight"].float(), layer["rope_parameters"], opened.sizes
    head_dim = layer.get("head_dim") or config.head_dim
    shape = sizes.layer_shape(sizes.query_size // head_dim)
    allowed = None
    if D2T in tensors:
        d2t = tensors.pop(D2T)
        allowed = torch.zeros(len(embed), dtype=torch.bool)
        allowed[torch.arange(len(d2t)) + d2t] = True
    return ManyMoa(
        weights={name: tensor.float() for name, tensor in tensors.items()},
        embed=embed,
        lm_head=own.get("lm_head.weight", embed).float(),
        num_heads=sizes.query_size // head_dim,
        num_kv_heads=sizes.key_size // head_dim,
        head_dim=head_dim,
        layer_heads=shape.num_heads,
        layer_kv_heads=shape.num_key_value_heads,
        layer_head_dim=shape.head_dim,
        rope_theta=rope["rope_theta"],
        eps=layer["rms_norm_eps"],
        layers=sizes.target_layers or None,
        self_frequencies=_scaled(target) if rope.get("rope_type", "default") != "default" else None,
        allowed=allowed,
    )


def _scaled(target: Path) -> list[float]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(target).model.rotary_emb.inv_freq.tolist()
