# ruff: noqa: N803, N806 - constants of a kernel are upper case in Triton
# mypy: allow-untyped-defs
"""The product with 8-bit rows: each weight is read once and decoded once.

    1. grid (tiles, splits):  part[s, b, n] = sum over the s-th part of k of x[b, k] * code[n, k]
    2. grid (blocks of n, B): y[b, n] = scale[n] * sum over s of part[s, b, n]  +  bias[n]

The parts of k give every processor something to read where tiles of 64 rows are few: the rows of ``fc`` are 64 tiles
at H = 4096.  They are summed in their order, so that y does not depend on timing.  With one part the first launch does
all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_gumiho.kernels.device import capability, converts_e4m3
from vllm_gumiho.kernels.eight_bit.decode import multiply, stored_codes
from vllm_gumiho.kernels.eight_bit.reference import EightBitRows


@triton.jit(do_not_specialize=["B", "N"])
def rows_linear_kernel(x_ptr, w_ptr, s_ptr, bias_ptr, part_ptr, out_ptr, B, N, x_stride, K: tl.constexpr,
                       SPLITS: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr):  # fmt: skip
    """x ``[B, K]``, w ``[N, K]`` codes, s and bias ``[N]`` -> part ``[SPLITS, B, N]`` float32, or out ``[B, N]``."""
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    EACH: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_B)
    w_ptr += rows[:, None].to(tl.int64) * K
    acc = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for block in tl.range(split * EACH, min(BLOCKS, (split + 1) * EACH), num_stages=NUM_STAGES):
        columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + columns[None, :], (rows < N)[:, None] & (columns < K)[None, :], other=0.0,
                    eviction_policy="evict_first")  # fmt: skip
        x = tl.load(x_ptr + inputs[None, :] * x_stride + columns[:, None],
                    (inputs < B)[None, :] & (columns < K)[:, None], other=0.0)  # fmt: skip
        acc = multiply(acc, w, x, PACKED)
    mask = (rows < N)[:, None] & (inputs < B)[None, :]
    if SPLITS == 1:
        acc *= tl.load(s_ptr + rows, rows < N, other=0.0)[:, None]
        if BIAS:
            acc += tl.load(bias_ptr + rows, rows < N, other=0.0).to(tl.float32)[:, None]
        where = inputs[None, :].to(tl.int64) * N + rows[:, None]
        tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask)
    else:
        where = (split * B + inputs[None, :]).to(tl.int64) * N + rows[:, None]
        tl.store(part_ptr + where, acc, mask)


@triton.jit(do_not_specialize=["B", "N"])
def sum_parts_kernel(part_ptr, s_ptr, bias_ptr, out_ptr, B, N, SPLITS: tl.constexpr, BIAS: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """part ``[SPLITS, B, N]`` -> out ``[B, N]``, summed in order."""
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(part_ptr + (split * B + row).to(tl.int64) * N + columns, columns < N, other=0.0)
    total *= tl.load(s_ptr + columns, columns < N, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + columns, columns < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * N + columns, total.to(out_ptr.dtype.element_ty), columns < N)


@dataclass(frozen=True)
class LinearTiling:
    """Sizes of the first launch: weight tiles ``[block_n, block_k]``, inputs padded to ``block_b``."""

    block_n: int
    block_b: int
    block_k: int
    num_stages: int
    splits: int
    num_warps: int = 4
    packed: bool = False
    native_fp8: bool = False


def choose_linear_tiling(
    batch: int, rows: int, columns: int, processors: int, amd: bool = False, packed: bool = True,
    native_fp8: bool = False, small_shared: bool = False,
) -> LinearTiling:  # fmt: skip
    """Tiles of 64 rows, in which a code lies in one warp alone; as many parts of k as give each processor two programs.

    A part has at least four blocks of k, so that its loads overlap.  small_shared: 100 KiB of shared memory a processor
    or less, of which more tiles at once would ask too much (96 KiB and more for float32 inputs).
    """
    block_b, block_k = max(16, 1 << (batch - 1).bit_length()), 128
    tiles, blocks = -(-rows // 64), -(-columns // block_k)
    wanted = max(1, min(-(-2 * processors // tiles), blocks // 4))
    each = -(-blocks // wanted)
    # At 32 inputs a fifth tile spills on cuda:80, and four warps do.
    depth = 2 if amd or small_shared else 5 if block_b == 16 else 4
    warps = 8 if block_b == 32 and not amd else 4
    return LinearTiling(64, block_b, block_k, depth, -(-blocks // each), warps, packed, native_fp8)


def _tiling(x: Tensor, rows: EightBitRows) -> LinearTiling:
    if x.device.type == "cpu":
        return choose_linear_tiling(x.shape[0], *rows.weight.shape, processors=2, packed=False)
    index = x.device.index or 0
    properties, amd = torch.cuda.get_device_properties(index), torch.version.hip is not None
    small = properties.shared_memory_per_multiprocessor < 128 << 10
    native = amd and converts_e4m3(capability(index))
    return choose_linear_tiling(
        x.shape[0], *rows.weight.shape, properties.multi_processor_count, amd, not amd, native, small
    )


def rows_linear_triton(
    x: Tensor, rows: EightBitRows, bias: Tensor | None = None, tiling: LinearTiling | None = None
) -> Tensor:
    """``x [B, K]`` -> ``[B, N]`` in x's dtype; B <= ``tiling.block_b``."""
    (batch, columns), count = x.shape, rows.weight.shape[0]
    tiling = tiling or _tiling(x, rows)
    if rows.weight.shape != (count, columns) or batch > tiling.block_b:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(rows.weight.shape)} do not fit {tiling}")
    if x.stride(1) != 1 or not rows.weight.is_contiguous() or not rows.scale.is_contiguous():
        raise ValueError("the kernel of 8-bit rows takes inputs of unit stride and contiguous weights")
    out = x.new_empty(batch, count)
    several = tiling.splits > 1
    part = torch.empty(tiling.splits, batch, count, dtype=torch.float32, device=x.device) if several else rows.scale
    codes, some_bias = stored_codes(rows.weight, tiling.native_fp8), rows.scale if bias is None else bias
    rows_linear_kernel[(triton.cdiv(count, tiling.block_n), tiling.splits)](
        x, codes, rows.scale, some_bias, part, out, batch, count, x.stride(0), columns, tiling.splits,
        bias is not None, tiling.packed, tiling.block_n, tiling.block_b, tiling.block_k, tiling.num_stages,
        num_warps=tiling.num_warps,
    )  # fmt: skip
    if several:
        sum_parts_kernel[(triton.cdiv(count, 512), batch)](
            part, rows.scale, some_bias, out, batch, count, tiling.splits, bias is not None, 512, num_warps=4
        )
    return out
