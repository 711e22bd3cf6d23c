"""Mixture of Attentions drafting written straight from its equations, the ground truth: whole sequences, float32.

Source: Mixture of Attentions for Speculative Decoding (arXiv 2410.03804) and the released code's shapes.  Per token, a
layer self-attention (LSA) over what the target's layers hold of it, its mean over layers through a linear map: the
token's feature.  A self-attention layer (SA) over the embeddings of all tokens, drafted ones among them.  A
cross-attention layer (CA) whose queries come from SA and whose keys and values come from features of verified tokens.

Two choices of this project: token x[0] is no input of SA (the target's last state is always that of the token before),
and where the LSA reads hidden states instead of keys and values, each layer's has a norm of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ReferenceMoa:
    """weights: tensors under their checkpoint names; embed, lm_head: the target's, ``[V, H]``.

    layers: of the target whose states are read, where the LSA reads states; None where it reads keys and values.
    self_frequencies: of SA's rotary embedding where the target scales its own; CA and LSA take the plain ones of the
    same base, as in the released code.
    """

    weights: dict[str, Tensor]
    embed: Tensor
    lm_head: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_heads: int
    layer_kv_heads: int
    layer_head_dim: int
    rope_theta: float
    eps: float
    layers: tuple[int, ...] | None
    self_frequencies: list[float] | None = None

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weights[f"{name}.weight"]

    def project(self, x: Tensor, name: str, heads: int, size: int) -> Tensor:
        return (x @ self.weights[f"{name}.weight"].T).view(x.shape[0], heads, size)

    def turned(self, x: Tensor, positions: list[int], frequencies: list[float] | None = None) -> Tensor:
        """x ``[T, heads, D]``: pairs (i, i + D/2) turned by position * theta^(-2i/D)."""
        half, rows = x.shape[-1] // 2, []
        frequencies = frequencies or [self.rope_theta ** (-i / half) for i in range(half)]
        for row, position in zip(x, positions, strict=True):
            angle = torch.tensor([position * frequency for frequency in frequencies])
            a, b = row[:, :half], row[:, half:]
            rows.append(torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1))
        return torch.stack(rows)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: list[int]) -> Tensor:
        """q ``[T, heads, D]`` over k and v ``[S, kv heads, D]``; row t sees the first ``seen[t]`` of them."""
        mixed = torch.zeros_like(q)
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]
            for t in range(q.shape[0]):
                scores = (k[: seen[t], shared] @ q[t, head]) / math.sqrt(q.shape[-1])
                mixed[t, head] = scores.softmax(0) @ v[: seen[t], shared]
        return mixed.reshape(q.shape[0], -1)

    def rest(self, x: Tensor, mixed: Tensor, at: str) -> Tensor:
        """What follows the attention in a Llama layer."""
        x = x + mixed @ self.weights[f"{at}.self_attn.o_proj.weight"].T
        y = self.norm(x, f"{at}.post_attention_layernorm")
        gate = torch.nn.functional.silu(y @ self.weights[f"{at}.mlp.gate_proj.weight"].T)
        up = y @ self.weights[f"{at}.mlp.up_proj.weight"].T
        return x + (gate * up) @ self.weights[f"{at}.mlp.down_proj.weight"].T

    def feature(self, held: Tensor) -> Tensor:
        """One token's feature ``[H]`` from what its layers hold, ``[m, W]``: every layer sees every layer."""
        at = "layer_self_attention"
        if self.layers is not None:
            held = torch.stack(
                [self.norm(state, f"state_norms.{i}") for i, state in zip(self.layers, held, strict=True)]
            )
        places = list(range(len(held))) if self.layers is None else list(self.layers)
        y = self.norm(held, f"{at}.input_layernorm")
        size = self.layer_head_dim
        q = self.turned(self.project(y, f"{at}.self_attn.q_proj", self.layer_heads, size), places)
        k = self.turned(self.project(y, f"{at}.self_attn.k_proj", self.layer_kv_heads, size), places)
        v = self.project(y, f"{at}.self_attn.v_proj", self.layer_kv_heads, size)
        mixed = self.attend(q, k, v, [len(held)] * len(held))
        mean = self.rest(held, mixed, at).mean(0)
        return self.weights["Ekv2E.weight"] @ mean + self.weights["Ekv2E.bias"]

    def self_attention(self, tokens: Tensor) -> Tensor:
        """SA on tokens x[1..T] at their positions, causal: ``[T]`` ids -> ``[T, H]``."""
        at, x, size = "self_attention", self.embed[tokens], self.head_dim
        places = list(range(1, len(tokens) + 1))
        turn = places, self.self_frequencies
        y = self.norm(x, f"{at}.input_layernorm")
        q = self.turned(self.project(y, f"{at}.self_attn.q_proj", self.num_heads, size), *turn)
        k = self.turned(
            self.project(y, f"{at}.self_attn.k_proj", self.num_kv_heads, size), places, self.self_frequencies
        )
        v = self.project(y, f"{at}.self_attn.v_proj", self.num_kv_heads, size)
        return self.rest(x, self.attend(q, k, v, [t + 1 for t in range(len(tokens))]), at)

    def cross_attention(self, x: Tensor, position: int, features: Tensor) -> Tensor:
        """CA of one query ``[H]`` at its token's position, over features ``[S, H]`` of positions 0..S-1."""
        at, size = "cross_attention", self.head_dim
        y, f = self.norm(x[None], f"{at}.input_layernorm"), self.norm(features, f"{at}.input_layernorm")
        q = self.turned(self.project(y, f"{at}.self_attn.q_proj", self.num_heads, size), [position])
        k = self.turned(
            self.project(f, f"{at}.self_attn.k_proj", self.num_kv_heads, size), list(range(features.shape[0]))
        )
        v = self.project(f, f"{at}.self_attn.v_proj", self.num_kv_heads, size)
        return self.rest(x[None], self.attend(q, k, v, [features.shape[0]]), at)[0]

    def draft(
        self, tokens: Tensor, held: Tensor, length: int, follow: list[int] | None = None
    ) -> tuple[list[int], Tensor]:
        """``length`` draft tokens after verified ones, and what each was drafted from, ``[length, H]``.

        tokens ``[T + 1]``: verified tokens x[0..T]; held ``[T, m, W]``: what the target's layers hold of x[0..T-1].
        follow: tokens that later ones go on from, in place of the drafted ones.
        """
        features = torch.stack([self.feature(each) for each in held])
        text, drafted, out = tokens[1:].tolist(), [], []
        for _ in range(length):
            x = self.self_attention(torch.tensor(text))[-1]
            out.append(self.cross_attention(x, len(text), features))
            drafted.append(int((self.lm_head @ out[-1]).argmax()))
            text.append(drafted[-1] if follow is None else follow[len(drafted) - 1])
        return drafted, torch.stack(out)
