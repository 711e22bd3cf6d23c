# ruff: noqa: N803 - constants of a kernel are upper case in Triton
# mypy: allow-untyped-defs
"""The LM head's argmax without writing logits, in two launches.

    1. grid (row blocks, vocabulary tiles):  partial[r, t] = (max, lowest index of it) of logit[r, v] over tile t
    2. grid (R,):                            (id, logit)[r] = the best of partial[r, :]

Row blocks are the fast axis of the grid: programs that read the same weights run together and share them in the L2.
A tile wholly of padding does not exist; padding within a tile is -inf with the tile's highest indices, so that it
loses even among logits of -inf.  A NaN counts as +inf.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_gumiho.kernels.device import capability, converts_e4m3
from vllm_gumiho.kernels.eight_bit.decode import multiply, stored_codes
from vllm_gumiho.kernels.lm_head_argmax.reference import TopToken
from vllm_gumiho.kernels.lm_head_argmax.tiles import row_tile

_NO_INDEX: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["R", "V", "tiles"])
def partial_argmax_kernel(rows_ptr, weight_ptr, s_ptr, top_ptr, index_ptr, R, V, tiles, row_stride, weight_stride,
                          SCALED: tl.constexpr, PACKED: tl.constexpr, H: tl.constexpr, BLOCK_V: tl.constexpr,
                          BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr):  # fmt: skip
    """rows ``[R, H]``, weight ``[V, H]`` -> top float32 and index int32, both ``[R, tiles]``.

    SCALED: the weights are 8-bit codes with scales ``[V]``.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    tokens = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows_ptr += rows[None, :] * row_stride
    weight_ptr += tokens[:, None].to(tl.int64) * weight_stride
    logits = tl.zeros((BLOCK_V, BLOCK_R), tl.float32)
    for block in tl.range(0, (H + BLOCK_K - 1) // BLOCK_K, num_stages=NUM_STAGES):
        columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
        w = tl.load(weight_ptr + columns[None, :], (tokens < V)[:, None] & (columns < H)[None, :], other=0.0)
        x = tl.load(rows_ptr + columns[:, None], (rows < R)[None, :] & (columns < H)[:, None], other=0.0)
        logits = multiply(logits, w, x, PACKED)
    if SCALED:
        logits *= tl.load(s_ptr + tokens, tokens < V, other=0.0)[:, None]
    logits = tl.where(logits == logits, logits, float("inf"))
    logits = tl.where((tokens < V)[:, None], logits, float("-inf"))
    top = tl.max(logits, axis=0)
    index = tl.min(tl.where(logits == top[None, :], tokens[:, None], _NO_INDEX), axis=0)
    where = rows * tiles + tl.program_id(1)
    tl.store(top_ptr + where, top, rows < R)
    tl.store(index_ptr + where, index, rows < R)


@triton.jit(do_not_specialize=["tiles", "index_offset"])
def reduce_argmax_kernel(top_ptr, index_ptr, ids_ptr, logits_ptr, tiles, index_offset, BLOCK_T: tl.constexpr):
    """Partials ``[R, tiles]`` -> ids int64 and logits float32 ``[R]``; ties to the lowest index."""
    row = tl.program_id(0)
    best = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    best_index = tl.full((BLOCK_T,), _NO_INDEX, tl.int32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        top = tl.load(top_ptr + row * tiles + tile, tile < tiles, other=float("-inf"))
        index = tl.load(index_ptr + row * tiles + tile, tile < tiles, other=_NO_INDEX)
        better = (top > best) | ((top == best) & (index < best_index))
        best = tl.where(better, top, best)
        best_index = tl.where(better, index, best_index)
    top = tl.max(best, axis=0)
    index = tl.min(tl.where(best == top, best_index, _NO_INDEX), axis=0)
    tl.store(ids_ptr + row, index.to(tl.int64) + index_offset)
    tl.store(logits_ptr + row, top)


@dataclass(frozen=True)
class ArgmaxTiling:
    """Sizes of the first launch: weight tiles ``[block_v, block_k]``, row tiles ``[block_r, block_k]``."""

    block_v: int
    block_r: int
    block_k: int
    num_stages: int
    num_warps: int = 4
    packed: bool = False
    native_fp8: bool = False


def choose_argmax_tiling(
    rows: int, element_size: int, small_shared: bool = False, packed: bool = False, native_fp8: bool = False
) -> ArgmaxTiling:
    """Tiles for up to `MAX_ROWS` rows; ``small_shared``: 64 KiB of shared memory per processor or thereabouts.

    One block of rows, so that weights pass through the L2 once, and more tokens a tile where there are more rows, which
    every tile of tokens reads again.
    """
    block_r = row_tile(rows)
    if element_size == 1:
        # A code lies in one warp alone; twice the depth of bf16's has as many bytes under way.
        depth = 2 if small_shared else 6 if block_r <= 32 else 5
        return ArgmaxTiling(64, block_r, 128, depth, 4, packed, native_fp8)
    if element_size == 4:
        return ArgmaxTiling(16, block_r, 32, 3)
    if block_r <= 32:
        return ArgmaxTiling(64, block_r, 128, 3 if small_shared else 4)
    return ArgmaxTiling(128, block_r, 64, 2 if small_shared else 4, 8)


def lm_head_argmax_triton(
    rows: Tensor,
    weight: Tensor,
    vocab_size: int,
    index_offset: int = 0,
    tiling: ArgmaxTiling | None = None,
    scale: Tensor | None = None,
) -> TopToken:
    """rows ``[R, H]`` x the first ``vocab_size`` rows of weight ``[V, H]`` -> the top token of each row.

    scale ``[V]`` float32: of 8-bit weights.
    """
    count, hidden = rows.shape
    if weight.shape[1] != hidden or rows.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError(f"rows {tuple(rows.shape)} and weight {tuple(weight.shape)} must agree and have unit stride")
    ids = torch.empty(count, dtype=torch.int64, device=rows.device)
    logits = torch.empty(count, dtype=torch.float32, device=rows.device)
    if count == 0:
        return TopToken(ids, logits)
    if tiling is None:
        small = rows.device.type == "cuda" and (
            torch.cuda.get_device_properties(rows.device).shared_memory_per_multiprocessor < 128 << 10
        )
        on_gpu, amd = rows.device.type == "cuda", torch.version.hip is not None
        native = on_gpu and amd and converts_e4m3(capability(rows.device.index or 0))
        tiling = choose_argmax_tiling(count, weight.element_size(), small, on_gpu and not amd, native)
    tiles = triton.cdiv(vocab_size, tiling.block_v)
    top = torch.empty(count, tiles, dtype=torch.float32, device=rows.device)
    index = torch.empty(count, tiles, dtype=torch.int32, device=rows.device)
    partial_argmax_kernel[(triton.cdiv(count, tiling.block_r), tiles)](
        rows, stored_codes(weight, tiling.native_fp8), top if scale is None else scale, top, index, count, vocab_size,
        tiles, rows.stride(0), weight.stride(0), scale is not None, tiling.packed, hidden,
        tiling.block_v, tiling.block_r, tiling.block_k, tiling.num_stages, num_warps=tiling.num_warps,
    )  # fmt: skip
    reduce_argmax_kernel[(count,)](top, index, ids, logits, tiles, index_offset, 1024, num_warps=4)
    return TopToken(ids, logits)
