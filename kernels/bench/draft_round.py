"""A whole draft round with random weights: two serial steps, the parallel heads and every argmax, for one CUDA graph.

    o = fc(cat[E[x], h]);  h1 = layers(o);  y1 = argmax lm_head(h1)          serial step 1
    o1 = fc(cat[E[y1], h1]);  h2 = layers(o1);  y2 = argmax lm_head(h2)      serial step 2
    o2 = fc(cat[E[y2], h2]);  z = heads(o1, o2);  y3.. = argmax lm_head(z)   heads, one LM head pass

Two Llama layers as in the released drafters (no norm before the first), grouped-query attention by torch's
``scaled_dot_product_attention`` over a KV cache of ``context`` tokens a request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_gumiho.kernels.bench.cases import ArgmaxCase, ArgmaxInputs, HeadsCase, HeadsInputs, argmax_logits
from vllm_gumiho.kernels.eight_bit import EIGHT_BIT, EightBitRows, dequantise_rows, quantise_rows, rows_linear
from vllm_gumiho.kernels.lm_head_argmax import TopToken, lm_head_argmax
from vllm_gumiho.kernels.parallel_heads import SPACING, parallel_heads, parallel_heads_batched, quantize_heads

SERIAL_STEPS = 2
DRAFT_VOCABULARY = 32_000
_LAYERS = 2
# Stored vectors on the way through a serial step, each one rounding: fc; for each layer two norms, the projections,
# the rotation, attention, o_proj, the residual, gate and up, their product, down_proj and the residual.
_ROUNDINGS = 1 + _LAYERS * 11


Matrix: TypeAlias = Tensor | EightBitRows


class Layer(NamedTuple):
    """One decoder layer."""

    qkv: Matrix  # [(heads + 2 kv heads) * D, H]
    out: Matrix  # [H, heads * D]
    gate_up: Matrix  # [2 * inner, H]
    down: Matrix  # [H, inner]


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """The library's product, or ours of 8-bit rows."""
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else rows_linear(x, weight, bias)


def in_float(weight: Matrix) -> Tensor:
    """What a matrix stands for, float32."""
    return weight.float() if isinstance(weight, Tensor) else dequantise_rows(weight)


class RoundInputs(NamedTuple):
    """One set: weights, KV caches and what the target's pass left."""

    fc: Matrix  # [H, 2H]
    fc_bias: Tensor  # [H]
    layers: list[Layer]
    heads: HeadsInputs
    lm_head: Matrix  # [V, H]
    embedding: Tensor  # [V, H]: a round reads a few rows of it
    cache: Tensor  # [layers, 2, B, kv heads, context + 2, D]
    rotations: Tensor  # [2, 2, D], of the two positions
    ids: Tensor  # [B]
    features: Tensor  # [B, H]


class RoundResult(NamedTuple):
    """What a round gives and passes through."""

    tokens: Tensor  # [B, 2 + n]
    fused: list[Tensor]  # the inputs of step 1 and 2 and o2, each [B, H]
    hidden: list[Tensor]  # h1, h2, each [B, H]
    z: Tensor  # [n, B, H]
    caches: list[Tensor]  # the KV cache entries written by each step, [layers, 2, B, kv heads, D]


def _rotation(head_dim: int, position: int, like: Tensor) -> Tensor:
    """Cosines and signed sines of the rotary embedding at a position, base 500,000: ``[2, D]``."""
    half = head_dim // 2
    angle = position * 500_000.0 ** (-torch.arange(half, device=like.device, dtype=torch.float32) / half)
    sin = angle.sin()
    return torch.stack((angle.cos().repeat(2), torch.cat((-sin, sin)))).to(like.dtype)


Step = Callable[[RoundInputs, Tensor, int], Tensor]


@dataclass(frozen=True)
class RoundCase:
    """B requests at Llama 3 8B's shape."""

    batch: int
    hidden: int = 4096
    inner: int = 14336
    query_heads: int = 32
    key_heads: int = 8
    vocab: int = 128_256
    heads: int = 5
    context: int = 1024
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    operation: str = "draft_round"
    weights: str = "bf16"  # or fp8, int8: of every matrix
    target_bytes: float = 15e9  # of one pass of the target: its weights

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden // self.query_heads

    def _heads_case(self) -> HeadsCase:
        return HeadsCase(self.hidden, self.batch, self.heads, self.dtype, self.device)

    def bytes(self, method: str) -> int:
        """Bytes that must move: each weight as often as a round reads it, and the KV caches."""
        h, d = self.hidden, self.head_dim
        layer = h * d * (2 * self.query_heads + 2 * self.key_heads) + 3 * h * self.inner
        lm_head = self.vocab * h
        cache = 2 * self.batch * self.key_heads * d * (self.context + 1)
        elements = SERIAL_STEPS * (2 * h * h + _LAYERS * layer + lm_head) + 2 * h * h + lm_head
        size = self.dtype.itemsize if self.weights == "bf16" else 1  # scales, a row each, are below 0.1 %
        of_heads = self._heads_case().bytes("" if self.weights == "bf16" else "fp8")
        return elements * size + SERIAL_STEPS * _LAYERS * cache * self.dtype.itemsize + of_heads

    def set_count(self, l2_bytes: int) -> int:
        """Two: a round reads gigabytes between two uses of a weight."""
        return 2

    def inputs(self, seed: int) -> RoundInputs:
        """Weights that keep the size of a vector."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=scale, generator=generator)

        h, d, inner = self.hidden, self.head_dim, self.inner
        layers = [
            Layer(
                normal((self.query_heads + 2 * self.key_heads) * d, h, scale=h**-0.5),
                normal(h, self.query_heads * d, scale=h**-0.5),
                normal(2 * inner, h, scale=h**-0.5),
                normal(h, inner, scale=inner**-0.5),
            )
            for _ in range(_LAYERS)
        ]

        def kept(weight: Tensor) -> Matrix:
            return weight if self.weights == "bf16" else quantise_rows(weight, EIGHT_BIT[self.weights])

        heads, lm_head = self._heads_case().inputs(seed), normal(self.vocab, h, scale=h**-0.5 * 4)
        if self.weights != "bf16":
            small, scales = quantize_heads(heads.weights, EIGHT_BIT[self.weights])
            heads = heads._replace(small=small, scales=scales)
        return RoundInputs(
            kept(normal(h, 2 * h, scale=(2 * h) ** -0.5)),
            normal(h, scale=0.3),
            [Layer(*map(kept, layer)) for layer in layers],
            heads,
            kept(lm_head),
            lm_head,
            normal(_LAYERS, 2, self.batch, self.key_heads, self.context + SERIAL_STEPS, d),
            torch.stack([_rotation(d, self.context + i, lm_head) for i in range(SERIAL_STEPS)]),
            torch.randint(self.vocab, (self.batch,), generator=generator, device=self.device),
            normal(self.batch, h),
        )

    def fuse(self, inputs: RoundInputs, ids: Tensor, features: Tensor) -> Tensor:
        """``o = fc(cat[E[x], h])``."""
        return linear(torch.cat((F.embedding(ids, inputs.embedding), features), dim=-1), inputs.fc, inputs.fc_bias)

    def step(self, inputs: RoundInputs, x: Tensor, number: int) -> Tensor:
        """The layers at position ``context + number``; writes the KV cache there.  ``[B, H]`` -> ``[B, H]``."""
        d, position = self.head_dim, self.context + number
        cos, sin = inputs.rotations[number]
        for i, layer in enumerate(inputs.layers):
            normed = x if i == 0 else F.rms_norm(x, x.shape[-1:])
            projected = linear(normed, layer.qkv).view(self.batch, -1, d)
            turned, v = projected.split([self.query_heads + self.key_heads, self.key_heads], dim=1)
            turned = torch.addcmul(turned * cos, turned.roll(d // 2, dims=-1), sin)
            q, k = turned.split([self.query_heads, self.key_heads], dim=1)
            keys, values = inputs.cache[i]
            keys[:, :, position] = k
            values[:, :, position] = v
            seen = F.scaled_dot_product_attention(
                q[:, :, None], keys[:, :, : position + 1], values[:, :, : position + 1], enable_gqa=True
            )
            x = x + linear(seen.flatten(1), layer.out)
            gate, up = linear(F.rms_norm(x, x.shape[-1:]), layer.gate_up).chunk(2, dim=-1)
            x = x + linear(F.silu(gate) * up, layer.down)
        return x

    def run(self, inputs: RoundInputs, library: bool = False, step: Step | None = None) -> RoundResult:
        """The round with our kernels, or with library calls and logits; step: the layers, if compiled."""
        tokens, hidden, fused, caches, ids, h = [], [], [], [], inputs.ids, inputs.features

        def argmax(rows: Tensor) -> Tensor:
            if not isinstance(inputs.lm_head, Tensor):
                return lm_head_argmax(rows, inputs.lm_head.weight, scale=inputs.lm_head.scale).ids
            given = ArgmaxInputs(rows, inputs.lm_head)
            return (argmax_logits(given) if library else lm_head_argmax(*given)).ids

        for number in range(SERIAL_STEPS):
            fused.append(self.fuse(inputs, ids, h))
            h = (step or self.step)(inputs, fused[-1], number)
            caches.append(inputs.cache[:, :, :, :, self.context + number])
            ids = argmax(h)
            hidden.append(h)
            tokens.append(ids[:, None])
        fused.append(self.fuse(inputs, ids, h))
        if library:
            z = parallel_heads_batched(torch.cat(fused[1:], dim=-1), inputs.heads.weights)
        elif self.weights != "bf16":
            z = parallel_heads(fused[1:], inputs.heads.small, inputs.heads.scales)
        else:
            z = parallel_heads(fused[1:], inputs.heads.weights)
        tokens.append(argmax(z.transpose(0, 1).flatten(0, 1)).view(self.batch, -1))
        return RoundResult(torch.cat(tokens, dim=1), fused, hidden, z, caches)

    def check(self, method: str, found: RoundResult, inputs: RoundInputs) -> tuple[float, float]:
        """The worst part of the round, as error and tolerance: the first wrong one, else the one nearest to it.

        Every part is compared with float32 arithmetic on what the part before it gave, so that a token that two nearly
        equal logits decide otherwise changes nothing.
        """
        exact = inputs._replace(
            fc=in_float(inputs.fc),
            fc_bias=inputs.fc_bias.float(),
            cache=inputs.cache.to(torch.float32, copy=True),
            rotations=inputs.rotations.float(),
            layers=[Layer(*map(in_float, layer)) for layer in inputs.layers],
        )
        written = [cache.to(torch.float32, copy=True) for cache in found.caches]
        parts: list[tuple[float, float]] = []

        def compare(got: Tensor, wanted: Tensor, roundings: int) -> None:
            tolerance = roundings * SPACING[self.dtype] * wanted.abs().max().item()
            parts.append(((got.float() - wanted).abs().max().item(), tolerance))

        ids, h = inputs.ids, inputs.features
        for number in range(SERIAL_STEPS + 1):
            embedded = F.embedding(ids, inputs.embedding).float()
            wanted = linear(torch.cat((embedded, h.float()), dim=-1), exact.fc, exact.fc_bias)
            compare(found.fused[number], wanted, 2)
            if number < SERIAL_STEPS:
                wanted = self.step(exact, found.fused[number].float(), number)
                compare(found.hidden[number], wanted, _ROUNDINGS)
                compare(written[number], exact.cache[:, :, :, :, self.context + number], _ROUNDINGS)
                # What the round wrote is what the next step reads.
                exact.cache[:, :, :, :, self.context + number] = written[number]
                ids, h = found.tokens[:, number], found.hidden[number]
        both = torch.cat(found.fused[1:], dim=-1)
        parts.append(
            self._heads_case().check(
                "round" if self.weights == "bf16" else "fp8", found.z, inputs.heads._replace(m=both)
            )
        )
        rows = torch.cat((torch.stack(found.hidden, dim=1), found.z.transpose(0, 1)), dim=1).flatten(0, 1)
        if not ((found.tokens >= 0) & (found.tokens < self.vocab)).all():
            return float("inf"), 0.0
        scored = ArgmaxCase(self.hidden, len(rows), self.vocab, self.dtype, self.device)
        top = TopToken(found.tokens.flatten(), rows.new_empty(0))
        head = inputs.lm_head
        head = head if isinstance(head, Tensor) else dequantise_rows(head, self.dtype)
        parts.append(scored.check("round", top, ArgmaxInputs(rows, head)))
        wrong = [part for part in parts if not part[0] <= part[1]]
        return wrong[0] if wrong else max(parts, key=lambda part: part[0] / part[1])

    def methods(self) -> dict[str, Callable[[RoundInputs], RoundResult]]:
        """Ours, then the same round by library calls, which have no products of 8-bit rows."""
        if self.weights != "bf16":
            return {f"triton, {self.weights} weights, {self.vocab} tokens": self.run}
        some = f", {self.vocab} tokens" if self.vocab == DRAFT_VOCABULARY else ""
        return {f"triton{some}": self.run, f"library calls{some}": partial(self.run, library=True)}

    def compiled_methods(self) -> dict[str, Callable[[RoundInputs], RoundResult]]:
        """Ours with the small operations of the layers fused, as they are in an engine."""
        torch.compiler.reset()
        return {"triton, torch.compile layers": partial(self.run, step=torch.compile(self.step, dynamic=False))}

    def at_copy_bandwidth(self, method: str, microseconds: float, copy_rate: float) -> tuple[float, float]:
        """The time as a multiple of that of the round's bytes, and of a target pass's, at copy_rate (GB/s)."""
        return microseconds / (self.bytes(method) / copy_rate / 1e3), microseconds / (
            self.target_bytes / copy_rate / 1e3
        )
