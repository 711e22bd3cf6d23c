"""Gumiho's drafting written straight from its equations, the ground truth: whole sequences, no cache, float32.

Source: Gumiho (arXiv 2503.10135) section 3 and the released code: one token pair ``(E[x[t+1]], h[t])`` a position,
``fc`` with the embedding first, Llama layers of which the first has no input norm, no final norm, six-stage heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ReferenceDrafter:
    """weights: tensors under their checkpoint names; embed, lm_head: the target's, ``[V, H]``.

    rounded: parts whose products round their inputs to int8 by rows, as vLLM's CPU build does: of ``linear`` (the
    layers), ``heads`` and ``lm_head``.
    """

    weights: dict[str, Tensor]
    embed: Tensor
    lm_head: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    eps: float
    rounded: frozenset[str] = frozenset()

    def product(self, x: Tensor, name: str) -> Tensor:
        """``x [..., K]`` times a matrix ``[N, K]``, of the weights by its name or ``lm_head``."""
        matrix = self.lm_head if name == "lm_head" else self.weights[name]
        part = name if name == "lm_head" else "heads" if name.startswith("mlp.") else "linear"
        if part not in self.rounded or name == "fc.weight":
            return x @ matrix.T
        return int8_rows(x) @ matrix.T

    def first_features(self, states: Tensor) -> Tensor:
        """What the first serial step reads, ``[T, H]``, of the states ``[T, m, H]`` of target layers, ascending."""
        layers = sorted(int(name.split(".")[1]) for name in self.weights if name.startswith("state_norms."))
        normed = [self.norm(states[:, i], f"state_norms.{layer}.weight") for i, layer in enumerate(layers)]
        return self.product(torch.cat(normed, dim=-1), "combine.weight") + self.weights["combine.bias"]

    def fuse(self, token: Tensor, feature: Tensor) -> Tensor:
        both = torch.cat((self.embed[token], feature), dim=-1)
        return self.product(both, "fc.weight") + self.weights["fc.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weights[name]

    def rotate(self, x: Tensor) -> Tensor:
        """x ``[T, heads, D]`` at positions 0..T-1: pairs (i, i + D/2) turned by position * theta^(-2i/D)."""
        half = self.head_dim // 2
        out = torch.empty_like(x)
        for position in range(x.shape[0]):
            for i in range(half):
                angle = position * self.rope_theta ** (-2 * i / self.head_dim)
                a, b = x[position, :, i], x[position, :, i + half]
                out[position, :, i] = a * math.cos(angle) - b * math.sin(angle)
                out[position, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def layer(self, x: Tensor, index: int) -> Tensor:
        at = f"layers.{index}."
        y = x if index == 0 else self.norm(x, f"{at}input_layernorm.weight")
        length = x.shape[0]

        def project(name: str, heads: int) -> Tensor:
            return self.product(y, f"{at}self_attn.{name}.weight").view(length, heads, self.head_dim)

        q = self.rotate(project("q_proj", self.num_heads))
        k = self.rotate(project("k_proj", self.num_kv_heads))
        v = project("v_proj", self.num_kv_heads)
        mixed = torch.zeros(length, self.num_heads, self.head_dim)
        for head in range(self.num_heads):
            shared = head * self.num_kv_heads // self.num_heads
            for t in range(length):
                scores = (k[: t + 1, shared] @ q[t, head]) / math.sqrt(self.head_dim)
                mixed[t, head] = scores.softmax(0) @ v[: t + 1, shared]
        x = x + self.product(mixed.reshape(length, -1), f"{at}self_attn.o_proj.weight")
        y = self.norm(x, f"{at}post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(self.product(y, f"{at}mlp.gate_proj.weight"))
        up = self.product(y, f"{at}mlp.up_proj.weight")
        return x + self.product(gate * up, f"{at}mlp.down_proj.weight")

    def transformer(self, fused: Tensor) -> Tensor:
        x = fused
        for index in range(2):
            x = self.layer(x, index)
        return x

    def head(self, m: Tensor, index: int) -> Tensor:
        def stage(x: Tensor, j: int) -> Tensor:
            at = f"mlp.{index}.{j}.linear."
            return torch.nn.functional.silu(self.product(x, f"{at}weight") + self.weights[f"{at}bias"])

        z = stage(m, 0)
        for j in range(1, 6):
            z = z + stage(z, j)
        return z

    def draft(self, tokens: Tensor, features: Tensor) -> tuple[list[int], list[Tensor]]:
        """Seven draft tokens and the features they come from.

        tokens ``[T + 1]``: verified tokens x[0..T]; features ``[T, H]``: the target's h[0..T-1].
        """
        fused = self.fuse(tokens[1:], features)
        h1 = self.transformer(fused)[-1]
        y1 = self.product(h1, "lm_head").argmax()
        o1 = self.fuse(y1, h1)
        h2 = self.transformer(torch.cat((fused, o1[None])))[-1]
        y2 = self.product(h2, "lm_head").argmax()
        o2 = self.fuse(y2, h2)
        drafted, out = [int(y1), int(y2)], [h1, h2]
        for index in range(5):
            z = self.head(torch.cat((o1, o2)), index)
            drafted.append(int(self.product(z, "lm_head").argmax()))
            out.append(z)
        return drafted, out


def int8_rows(x: Tensor) -> Tensor:
    """``[..., K]``, each row rounded to whole 127ths of its largest magnitude."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(step > 0, (x / step).round() * step, x)
