"""The check that each kernel has to pass when the model is loaded: right on this device, with the model's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from vllm_gumiho.drafters.lm_head import GreedyArgmax, LmHeadShard
from vllm_gumiho.kernels.eight_bit import EightBitRows, rows_linear, rows_linear_reference
from vllm_gumiho.kernels.eight_bit import launches as product_launches
from vllm_gumiho.kernels.lm_head_argmax import launches as argmax_launches
from vllm_gumiho.kernels.lm_head_argmax import lm_head_argmax
from vllm_gumiho.kernels.parallel_heads import (
    GAVE_UP,
    HEAD_STAGES,
    SPACING,
    HeadScales,
    HeadsPath,
    HeadWeights,
    parallel_heads,
    parallel_heads_batched,
    parallel_heads_reference,
)
from vllm_gumiho.kernels.parallel_heads import launches as heads_launches


def wrong_tokens(tokens: GreedyArgmax, row_counts: Iterable[int], dtype: torch.dtype) -> str | None:
    """What is wrong with this rank's own tokens for random features, against the LM head's own logits."""
    weight, size = tokens.shard.weight, tokens.shard.size
    if not size:
        return None
    try:
        for rows in (random_rows(count, weight.shape[1], weight.device, dtype) for count in row_counts):
            logits = tokens.shard.logits(rows)[:, :size].float()
            found = lm_head_argmax(rows, weight, size, scale=tokens.shard.scale)
            if not ((found.ids >= 0) & (found.ids < size)).all():
                return f"an id outside of the {size} tokens for {len(rows)} rows"
            best, at_found = logits.amax(-1), logits.gather(1, found.ids[:, None])[:, 0]
            # Two rounded logits, and the order of the float32 sums.
            longest = _longest(tokens.shard)
            sums = rows.shape[1] * 2.0**-24 * rows.float().norm(dim=-1) * longest
            allowed = 2 * SPACING[dtype] * logits.abs().amax(-1) + sums
            error = torch.maximum(best - at_found, (found.logits - best).abs())
            if not (error <= allowed).all():
                return f"off by {error.max().item():.2e} for {len(rows)} rows"
    except Exception as error:  # it must not keep the model from starting
        return _raised(error)
    return None


def _longest(shard: LmHeadShard, block: int = 1 << 14) -> Tensor:
    """Length of the longest row of an LM head, a block of rows at a time."""
    found = []
    for start in range(0, shard.size, block):
        rows = shard.weight[start : min(start + block, shard.size)].float()
        if shard.scale is not None:
            rows = rows * shard.scale[start : start + len(rows), None]
        found.append(rows.norm(dim=-1).amax())
    return torch.stack(found).amax()


def wrong_products(matrices: Iterable[EightBitRows], batches: Iterable[int], dtype: torch.dtype) -> str | None:
    """What is wrong with the kernel's products of 8-bit rows, None where they are the reference's but for roundings."""
    try:
        for rows in matrices:
            count, columns = rows.weight.shape
            for batch in batches:
                x = random_rows(batch, columns, rows.weight.device, dtype)
                found, right = rows_linear(x, rows), rows_linear_reference(x.float(), rows)
                error = (found.float() - right).abs().max().item()
                if not error <= 2 * SPACING[dtype] * right.abs().max().item():
                    return f"off by {error:.2e} for {batch} inputs of {count} rows"
    except Exception as error:  # it must not keep the model from starting
        return _raised(error)
    return None


def wrong_heads(
    weights: HeadWeights,
    path: HeadsPath,
    counts: Iterable[int],
    batches: Iterable[int],
    counters: Tensor,
    scales: HeadScales | None = None,
) -> str | None:
    """What is wrong with a path on random inputs, None where it equals the float32 reference.

    counts: of the first heads, each of which is a kernel of its own.  batches: sizes, one at least for each tile.
    Tolerance: one rounding of z a stage, as the tests have it, or four times the error of the library's own products,
    where the weights amplify the roundings.
    """
    hidden = weights.first_bias.shape[1]
    dtype = weights.bias.dtype
    try:
        for m in (random_rows(b, weights.first_weight.shape[2], weights.weight.device, dtype) for b in batches):
            most = max(counts)
            exact = parallel_heads_reference(m.float(), weights.take(most), scales and scales.take(most))
            for count in counts:
                some, right, small = weights.take(count), exact[:count], scales and scales.take(count)
                library = (parallel_heads_batched(m, some, small).float() - right).abs().max().item()
                allowed = max(HEAD_STAGES * SPACING[dtype] * right.abs().max().item(), 4 * library)
                run = partial(parallel_heads, m.split(hidden, dim=1), some, small, path=path, counters=counters)
                # Launched again and replayed from a CUDA graph: the counters have to serve each time.
                for z in [run(), run(), *([_replayed(run)] if m.is_cuda else [])]:
                    error = (z.float() - right).abs().max().item()
                    if not error <= allowed:
                        return f"off by {error:.2e} with {count} heads at batch {len(m)}"
                    if counters[0] or counters[GAVE_UP]:
                        return f"its barrier gave up or left its counters with {count} heads at batch {len(m)}"
    except Exception as error:  # it must not keep the model from starting
        return _raised(error)
    return None


def random_rows(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
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
def uncounted() -> Iterator[None]:
    """Launches of the check are none of drafting's."""
    counters: tuple[Counter, ...] = (heads_launches, argmax_launches, product_launches)
    before = [counter.copy() for counter in counters]
    try:
        yield
    finally:
        for counter, kept in zip(counters, before, strict=True):
            counter.clear()
            counter.update(kept)
