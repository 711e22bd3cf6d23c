"""Which kernels draft: the switch, and the check that each has to pass when the model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_gumiho.drafters.lm_head import GreedyArgmax
from vllm_gumiho.drafters.ranks import lowest_of_all_ranks
from vllm_gumiho.env import KERNELS
from vllm_gumiho.errors import KernelChoiceError
from vllm_gumiho.kernels.lm_head_argmax import launches as argmax_launches
from vllm_gumiho.kernels.lm_head_argmax import lm_head_argmax
from vllm_gumiho.kernels.parallel_heads import (
    HEAD_STAGES,
    SPACING,
    HeadsPath,
    HeadWeights,
    choose_path,
    parallel_heads,
    parallel_heads_batched,
    parallel_heads_reference,
)
from vllm_gumiho.kernels.parallel_heads import launches as heads_launches
from vllm_gumiho.kernels.parallel_heads.tiling import MAX_BATCH

# From the safest to the one that asks most of the device.
_PATHS = (HeadsPath.BATCHED, HeadsPath.STAGES, HeadsPath.FUSED)


class Switch(str, Enum):
    """Values of VLLM_GUMIHO_KERNELS: on a GPU with greedy drafting, wherever they run, nowhere."""

    AUTO = "auto"
    ON = "1"
    OFF = "0"


class Choice(NamedTuple):
    """How the parallel heads and the greedy tokens are computed, and why, for the log."""

    heads: HeadsPath
    heads_reason: str
    argmax: bool
    argmax_reason: str

    def describe(self) -> str:
        """For the log line at start."""
        name = "Triton kernel" if self.argmax else "logits"
        return f"heads by {self.heads.value} ({self.heads_reason}), argmax by {name} ({self.argmax_reason})"


def kernel_switch() -> Switch:
    """What VLLM_GUMIHO_KERNELS asks for; unset is auto.  Raises KernelChoiceError."""
    value = KERNELS.get()
    try:
        return Switch.AUTO if value is None else Switch(value)
    except ValueError:
        raise KernelChoiceError(
            f"{KERNELS.name}={value!r} is not a choice; set it to auto (the default: Triton kernels on a GPU with "
            "greedy drafting), 1 (wherever they run) or 0 (off)"
        ) from None


def refusal(switch: Switch, device: torch.device, greedy: bool) -> str | None:
    """Why no Triton kernel is to be used, None where they are asked for."""
    if switch is Switch.OFF:
        return f"{KERNELS.name}=0"
    if switch is Switch.AUTO and device.type != "cuda":  # ROCm devices too are "cuda" in torch
        return f"no GPU; {KERNELS.name}=1 asks for the Triton kernels all the same"
    if switch is Switch.AUTO and not greedy:
        return f"drafts are sampled; {KERNELS.name}=1 asks for the Triton kernels all the same"
    return None


def wrong_tokens(tokens: GreedyArgmax, row_counts: list[int], dtype: torch.dtype) -> str | None:
    """What is wrong with this rank's own tokens for random features, against the LM head's own logits."""
    weight, size = tokens.shard.weight, tokens.shard.size
    if not size:
        return None
    try:
        for rows in (_random(count, weight.shape[1], weight.device, dtype) for count in row_counts):
            logits = tokens.shard.logits(rows)[:, :size].float()
            found = lm_head_argmax(rows, weight, size)
            if not ((found.ids >= 0) & (found.ids < size)).all():
                return f"an id outside of the {size} tokens for {len(rows)} rows"
            best, at_found = logits.amax(-1), logits.gather(1, found.ids[:, None])[:, 0]
            # Two rounded logits, and the order of the float32 sums.
            longest = torch.linalg.vector_norm(weight[:size], dim=-1, dtype=torch.float32).amax()
            sums = rows.shape[1] * 2.0**-24 * rows.float().norm(dim=-1) * longest
            allowed = 2 * SPACING[dtype] * logits.abs().amax(-1) + sums
            error = torch.maximum(best - at_found, (found.logits - best).abs())
            if not (error <= allowed).all():
                return f"off by {error.max().item():.2e} for {len(rows)} rows"
    except Exception as error:  # it must not keep the model from starting
        return _raised(error)
    return None


def wrong_heads(weights: HeadWeights, path: HeadsPath, batches: list[int], counters: Tensor) -> str | None:
    """What is wrong with a path on random inputs of these batch sizes, None where it equals the float32 reference.

    Tolerance: one rounding of z a stage, as the tests have it, or four times the error of the library's own products,
    where the weights amplify the roundings.
    """
    hidden = weights.first_bias.shape[1]
    dtype = weights.first_weight.dtype
    try:
        for m in (_random(b, weights.first_weight.shape[2], weights.weight.device, dtype) for b in batches):
            exact = parallel_heads_reference(m.float(), weights)
            library = (parallel_heads_batched(m, weights).float() - exact).abs().max().item()
            allowed = max(HEAD_STAGES * SPACING[dtype] * exact.abs().max().item(), 4 * library)
            run = partial(parallel_heads, m.split(hidden, dim=1), weights, path=path, counters=counters)
            # Launched again and replayed from a CUDA graph: the counters have to serve each time.
            for z in [run(), run(), *([_replayed(run)] if m.is_cuda else [])]:
                error = (z.float() - exact).abs().max().item()
                if not error <= allowed:
                    return f"off by {error:.2e} at batch {len(m)}"
                if counters.any():
                    return f"its barrier gave up or left its counters at batch {len(m)}"
    except Exception as error:  # it must not keep the model from starting
        return _raised(error)
    return None


def choose_kernels(
    weights: HeadWeights,
    counters: Tensor,
    tokens: GreedyArgmax | None,
    tokens_refused: str | None,
    greedy: bool,
    max_batch: int,
    num_heads: int,
) -> Choice:
    """Decide once, when the model is loaded: every kernel asked for is checked, and left out where it fails.

    weights: of this rank's heads, out of ``num_heads`` in all.  tokens: the argmax kernel on this LM head, None where
    ``tokens_refused`` says why it does not apply.  All ranks of a tensor-parallel group come to the same choice.

    Raises: KernelChoiceError where a kernel that is forced fails.
    """
    switch, dtype = kernel_switch(), weights.first_weight.dtype
    refused = refusal(switch, weights.weight.device, greedy)
    with _uncounted():
        path, reason, failed = _choose_heads(weights, counters, max_batch, refused)
        problem = refused or tokens_refused
        if problem is None:
            assert tokens is not None
            row_counts = sorted({1, min(max_batch, MAX_BATCH), min(max_batch, MAX_BATCH) * num_heads})
            problem = wrong_tokens(tokens, row_counts, dtype)
            problem = problem and f"the kernel failed its check: {problem}"
            if problem and switch is Switch.ON:
                raise KernelChoiceError(f"{KERNELS.name}=1, but argmax: {problem}; unset it")
    if switch is Switch.ON and failed:
        raise KernelChoiceError(f"{KERNELS.name}=1, but {reason}; unset it")
    agreed = lowest_of_all_ranks([_PATHS.index(path), int(problem is None)])
    if _PATHS[agreed[0]] is not path:
        path, reason = _PATHS[agreed[0]], "its check failed on another rank"
    if problem is None and not agreed[1]:
        problem = "its check failed on another rank"
    return Choice(path, reason, problem is None, problem or "checked")


def _choose_heads(
    weights: HeadWeights, counters: Tensor, max_batch: int, refused: str | None
) -> tuple[HeadsPath, str, bool]:
    """The path, why, and whether every kernel failed."""
    if refused is not None:
        return HeadsPath.BATCHED, refused, False
    best, reason = choose_path(weights.first_bias.new_empty(1, 0), weights)
    failed: list[str] = []
    largest = min(max_batch, MAX_BATCH)
    batches = sorted({1, largest, *(b for b in (16, 32) if b < largest)})  # every batch tile there is
    for path in reversed(_PATHS[1 : _PATHS.index(best) + 1]):
        problem = wrong_heads(weights, path, batches, counters)
        if problem is None:
            return path, "; ".join([*failed, "checked" if failed else f"{reason}; checked"]), False
        counters.zero_()
        failed.append(f"{path.value} failed its check: {problem}")
    return HeadsPath.BATCHED, "; ".join(failed) or reason, bool(failed)


def _random(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[rows, columns]`` of unit variance; leaves the global generators alone."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(device, dtype)


def _replayed(run: Callable[[], Tensor]) -> Tensor:
    """What ``run`` gives from the second replay of a CUDA graph of it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = run()
    graph.replay()
    z.zero_()
    graph.replay()
    return z.clone()


def _raised(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


@contextmanager
def _uncounted() -> Iterator[None]:
    """Launches of the check are none of drafting's."""
    counters: tuple[Counter, ...] = (heads_launches, argmax_launches)
    before = [counter.copy() for counter in counters]
    try:
        yield
    finally:
        for counter, kept in zip(counters, before, strict=True):
            counter.clear()
            counter.update(kept)
