"""What the benchmark runs: inputs, our kernels, the baselines, and the check of each result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_gumiho.kernels.lm_head_argmax import MAX_ROWS, TopToken, lm_head_argmax
from vllm_gumiho.kernels.parallel_heads import (
    HEAD_STAGES,
    SPACING,
    HeadScales,
    HeadsPath,
    HeadWeights,
    dequantize_heads,
    parallel_heads,
    parallel_heads_batched,
    parallel_heads_reference,
    quantize_heads,
)
from vllm_gumiho.kernels.parallel_heads.tiling import MAX_BATCH


class HeadsInputs(NamedTuple):
    """One set: m ``[B, 2H]``, full-precision weights and 8-bit weights of the same heads."""

    m: Tensor
    weights: HeadWeights
    small: HeadWeights
    scales: HeadScales


def heads_loop(inputs: HeadsInputs) -> Tensor:
    """A loop over ``nn.Linear``'s function, head by head, stage by stage: what published ports do."""
    w, found = inputs.weights, []
    for i in range(w.first_weight.shape[0]):
        z = F.silu(F.linear(inputs.m, w.first_weight[i], w.first_bias[i]))
        for j in range(HEAD_STAGES - 1):
            z = z + F.silu(F.linear(z, w.weight[i, j], w.bias[i, j]))
        found.append(z)
    return torch.stack(found)


def heads_baddbmm(inputs: HeadsInputs) -> Tensor:
    """Six batched products."""
    return parallel_heads_batched(inputs.m, inputs.weights)


def heads_triton(inputs: HeadsInputs, fp8: bool = False, path: HeadsPath | None = None) -> Tensor:
    """Our kernel."""
    if fp8:
        return parallel_heads(inputs.m, inputs.small, inputs.scales, path=path)
    return parallel_heads(inputs.m, inputs.weights, path=path)


@dataclass(frozen=True)
class HeadsCase:
    """n heads of H for B requests."""

    hidden: int
    batch: int
    heads: int = 5
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    operation: str = "parallel_heads"

    def _elements(self) -> int:
        return self.heads * self.hidden * self.hidden * (HEAD_STAGES + 1)

    def bytes(self, method: str) -> int:
        """Bytes that must move: weights, biases (and scales), m, z; nothing for what stays between the stages."""
        size, fp8 = self.dtype.itemsize, "fp8" in method
        rows = self.heads * self.hidden * HEAD_STAGES
        activations = self.batch * self.hidden * (2 + self.heads) * size
        return self._elements() * (1 if fp8 else size) + rows * (size + (4 if fp8 else 0)) + activations

    def set_count(self, l2_bytes: int) -> int:
        """Sets of which even the 8-bit weights together are four times the L2, two at least."""
        return max(2, -(-4 * l2_bytes // self._elements()))

    def inputs(self, seed: int) -> HeadsInputs:
        """Weights that keep the size of a vector from stage to stage."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int, scale: float) -> Tensor:
            t = torch.empty(shape, dtype=self.dtype, device=self.device)
            return t.normal_(std=scale, generator=generator)

        n, h = self.heads, self.hidden
        weights = HeadWeights(
            normal(n, h, 2 * h, scale=(2 * h) ** -0.5),
            normal(n, h, scale=0.3),
            normal(n, HEAD_STAGES - 1, h, h, scale=h**-0.5),
            normal(n, HEAD_STAGES - 1, h, scale=0.3),
        )
        return HeadsInputs(normal(self.batch, 2 * h, scale=1.0), weights, *quantize_heads(weights))

    def check(self, method: str, z: Tensor, inputs: HeadsInputs) -> tuple[float, float]:
        """Largest error against the float32 reference, and what one rounding of z a stage explains."""
        error, largest = 0.0, 0.0
        for i in range(self.heads):  # one head's weights in float32 at a time
            one = HeadWeights(*(t[i : i + 1] for t in (inputs.small if "fp8" in method else inputs.weights)))
            if "fp8" in method:
                one = dequantize_heads(one, HeadScales(*(t[i : i + 1] for t in inputs.scales)), torch.float32)
            exact = parallel_heads_reference(inputs.m.float(), one)[0]
            wrong = (z[i].float() - exact).abs().max().item()
            error = wrong if not wrong <= error else error  # a NaN stays
            largest = max(largest, exact.abs().max().item())
        return error, HEAD_STAGES * SPACING[self.dtype] * largest

    def methods(self) -> dict[str, Callable[[HeadsInputs], Tensor]]:
        """Ours, up to the batch that it takes, then the baselines."""
        found: dict[str, Callable[[HeadsInputs], Tensor]] = {}
        if self.batch <= MAX_BATCH:
            found["triton"] = heads_triton
            if self.device == "cpu":
                found["triton, one launch"] = partial(heads_triton, path=HeadsPath.FUSED)
            else:
                found["triton, launch per stage"] = partial(heads_triton, path=HeadsPath.STAGES)
        return found | {
            "triton, fp8 weights": partial(heads_triton, fp8=True),
            "baddbmm": heads_baddbmm,
            "nn.Linear loop": heads_loop,
        }

    def compiled_methods(self) -> dict[str, Callable[[HeadsInputs], Tensor]]:
        """torch.compile's best on both ways to write it; without its own CUDA graphs, which the timing provides."""
        torch.compiler.reset()
        return {
            f"torch.compile {name}": torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)
            for name, function in (("baddbmm", heads_baddbmm), ("nn.Linear loop", heads_loop))
        }


class ArgmaxInputs(NamedTuple):
    """rows ``[R, H]``, LM head ``[V, H]``."""

    rows: Tensor
    weight: Tensor


def argmax_logits(inputs: ArgmaxInputs) -> TopToken:
    """Logits written out, then their maximum."""
    top = (inputs.rows @ inputs.weight.T).max(dim=-1)
    return TopToken(top.indices, top.values.float())


@dataclass(frozen=True)
class ArgmaxCase:
    """An LM head at Llama 3's vocabulary; ``batch`` is the number of rows."""

    hidden: int
    batch: int
    vocab: int = 128_256
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    operation: str = "lm_head_argmax"

    def bytes(self, method: str) -> int:
        """The LM head, the rows and the tokens."""
        return (self.vocab + self.batch) * self.hidden * self.dtype.itemsize + self.batch * 12

    def set_count(self, l2_bytes: int) -> int:
        """As for the heads."""
        return max(2, -(-4 * l2_bytes // (self.vocab * self.hidden * self.dtype.itemsize)))

    def inputs(self, seed: int) -> ArgmaxInputs:
        """Rows of unit variance, logits of unit variance."""
        generator = torch.Generator(self.device).manual_seed(seed)
        rows = torch.empty(self.batch, self.hidden, dtype=self.dtype, device=self.device)
        weight = torch.empty(self.vocab, self.hidden, dtype=self.dtype, device=self.device)
        rows.normal_(generator=generator)
        return ArgmaxInputs(rows, weight.normal_(std=self.hidden**-0.5, generator=generator))

    def check(self, method: str, found: TopToken, inputs: ArgmaxInputs) -> tuple[float, float]:
        """How far the found tokens' float32 logits lie below the best, and what two rounded logits may confuse."""
        worst, allowed = 0.0, 0.0
        for rows, ids in zip(inputs.rows.split(32), found.ids.split(32), strict=True):
            logits = rows.float() @ inputs.weight.float().T
            best = logits.amax(dim=-1)
            worst = max(worst, (best - logits.gather(1, ids[:, None])[:, 0]).max().item())
            allowed = max(allowed, 2 * SPACING[self.dtype] * best.abs().max().item())
        return worst, allowed

    def methods(self) -> dict[str, Callable[[ArgmaxInputs], TopToken]]:
        """Ours, up to the rows that it takes, then the baseline."""
        ours: dict[str, Callable[[ArgmaxInputs], TopToken]] = {"triton": lambda inputs: lm_head_argmax(*inputs)}
        return (ours if self.batch <= MAX_ROWS else {}) | {"logits, then max": argmax_logits}

    def compiled_methods(self) -> dict[str, Callable[[ArgmaxInputs], TopToken]]:
        """None: a library product does the work."""
        return {}
