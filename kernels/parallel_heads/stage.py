# ruff: noqa: N803, N806 - constants of a kernel are upper case in Triton
# mypy: allow-untyped-defs
"""One program's part of one stage of the parallel heads: which tiles and K blocks it takes, and what it does with them.

Whole tiles are dealt out in rounds: program p takes p, p + programs, ...  The tiles of the last round, too few for all
programs, are dealt out by K blocks where SPREAD: each program takes an equal run of them, of one tile or of the end of
one and the start of the next ("stream-K", arXiv 2301.03598).  Sums of a part of a tile go to ``parts``.  Each of a
tile's programs takes a ticket of it then; who takes the last one adds up the parts in the order of their columns, so
that z does not depend on timing, and puts the ticket back to zero.  Nobody waits for anybody.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_gumiho.kernels.eight_bit.decode import multiply


@triton.jit
def program_share(program, programs, TILES: tl.constexpr, K_BLOCKS: tl.constexpr, SPREAD: tl.constexpr):
    """K blocks of whole tiles, and the run begin..end of those of the last round's tiles, that a program takes."""
    rounds = TILES // programs
    if SPREAD:
        blocks = (TILES - rounds * programs) * K_BLOCKS
        takers = max(1, min(programs, blocks))
        whole = rounds * K_BLOCKS
        begin = blocks * min(program, takers) // takers
        end = blocks * min(program + 1, takers) // takers
    else:
        whole = (TILES - program + programs - 1) // programs * K_BLOCKS
        begin = 0
        end = 0
    return whole, begin, end


@triton.jit
def taker(block, programs, blocks):
    """The program whose run of the last round's blocks holds this one."""
    takers = min(programs, blocks)
    return ((block + 1) * takers - 1) // blocks


@triton.jit
def tile_and_block(step, program, programs, whole, begin, TILES: tl.constexpr, K_BLOCKS: tl.constexpr,
                   SPREAD: tl.constexpr):  # fmt: skip
    """Tile and K block of a program's step; ``(TILES, 0)`` or beyond where it has none."""
    tile = program + (step // K_BLOCKS) * programs
    block = step % K_BLOCKS
    if SPREAD:
        rest = begin + step - whole
        tile = tl.where(step < whole, tile, TILES // programs * programs + rest // K_BLOCKS)
        block = tl.where(step < whole, block, rest % K_BLOCKS)
    return tile, block


@triton.jit
def weight_tile(w_ptr, HEAD_STRIDE: tl.constexpr, tile, k_block, HEADS: tl.constexpr, H: tl.constexpr,
                PARTS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Rows of one tile, columns of one K block: ``[BLOCK_H, BLOCK_K]``; zeros beyond the matrix and the last tile.

    K is PARTS times H columns, and no K block reaches over the end of a part.
    """
    H_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    PART_BLOCKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    head = tile // H_TILES
    rows = (tile % H_TILES) * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = (k_block % PART_BLOCKS) * BLOCK_K + tl.arange(0, BLOCK_K)
    # 64-bit: eight heads of H = 8192 are more than 2^31 elements.
    base = w_ptr + head.to(tl.int64) * HEAD_STRIDE + k_block // PART_BLOCKS * H
    mask = (rows < tl.where(head < HEADS, H, 0))[:, None] & (columns < H)[None, :]
    return tl.load(base + rows[:, None] * (PARTS * H) + columns[None, :], mask, other=0.0,
                   eviction_policy="evict_first")  # fmt: skip


@triton.jit
def ask_ahead(w_ptr, HEAD_STRIDE: tl.constexpr, tile, k_block, HEADS: tl.constexpr, H: tl.constexpr,
              PARTS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """Ask the L2 for AHEAD bytes of a tile from a K block on, a line of 128 at a time.

    Lines beyond a row's end repeat its last.
    """
    H_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    PART_BLOCKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = AHEAD // 128 // BLOCK_H
    head = tl.minimum(tile // H_TILES, HEADS - 1)
    rows = tl.minimum((tile % H_TILES) * BLOCK_H + tl.arange(0, BLOCK_H), H - 1)
    start = k_block // PART_BLOCKS * H + k_block % PART_BLOCKS * BLOCK_K
    columns = tl.minimum(start + tl.arange(0, LINES) * LINE, PARTS * H - 1)
    lines = w_ptr + head.to(tl.int64) * HEAD_STRIDE + rows[:, None] * (PARTS * H) + columns[None, :]
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32,
                              is_pure=False, pack=1)  # fmt: skip


@triton.jit
def _finish(acc, tile, x_ptr, b_ptr, s_ptr, B_HEAD_STRIDE: tl.constexpr, out_ptr, B, SCALED: tl.constexpr,
            RESIDUAL: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
            BLOCK_B: tl.constexpr):  # fmt: skip
    """Scale, bias, SiLU and the residual of a tile's sums ``[BLOCK_H, BLOCK_B]`` float32, and its z."""
    H_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    head = tile // H_TILES
    rows = (tile % H_TILES) * BLOCK_H + tl.arange(0, BLOCK_H)
    requests = tl.arange(0, BLOCK_B)
    in_head = rows < H
    if SCALED:
        acc *= tl.load(s_ptr + head * B_HEAD_STRIDE + rows, in_head, other=0.0)[:, None]
    acc += tl.load(b_ptr + head * B_HEAD_STRIDE + rows, in_head, other=0.0).to(tl.float32)[:, None]
    z = acc * tl.sigmoid(acc)
    where = requests[None, :] * (HEADS * H) + head * H + rows[:, None]
    mask = in_head[:, None] & (requests < B)[None, :]
    if RESIDUAL:
        z += tl.load(x_ptr + where, mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(out_ptr + where, z.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _part(parts_ptr, slot, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """Where a program keeps a part of a tile's sums: two slots each, of its run's first tile and of the next."""
    inside = tl.arange(0, BLOCK_H)[:, None] * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    return parts_ptr + slot * (BLOCK_H * BLOCK_B) + inside


@triton.jit
def _step(acc, at, w, step, steps, tile, block, x_ptr, x_stride, last_ptr, last_stride, b_ptr, s_ptr,
          B_HEAD_STRIDE: tl.constexpr, out_ptr, parts_ptr, B, program, programs, whole, begin, SCALED: tl.constexpr,
          PACKED: tl.constexpr, SPREAD: tl.constexpr, RESIDUAL: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr,
          PARTS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Add one K block to ``acc [BLOCK_H, BLOCK_B]`` float32; after a tile's or the run's last, pass it on.

    at: the tile again, for what comes after the sum.  It is carried from step to step: what depends on ``tile`` is
    worked out some steps ahead, with the loads, and would be kept in registers until then.
    """
    H_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    TILES: tl.constexpr = HEADS * H_TILES
    PART_BLOCKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    K_BLOCKS: tl.constexpr = PARTS * PART_BLOCKS
    columns = (block % PART_BLOCKS) * BLOCK_K + tl.arange(0, BLOCK_K)
    requests = tl.arange(0, BLOCK_B)
    if RESIDUAL:  # every head its own input
        part_ptr, stride = x_ptr + tile // H_TILES * H, x_stride
    elif PARTS == 1:
        part_ptr, stride = last_ptr, last_stride
    else:
        part = block // PART_BLOCKS
        part_ptr = tl.where(part < PARTS - 1, x_ptr + part * H, last_ptr)
        stride = tl.where(part < PARTS - 1, x_stride, last_stride)
    # .cg: other programs wrote these in the stage before; only the L2 is common to all.
    x = tl.load(
        part_ptr + requests[None, :] * stride + columns[:, None],
        (requests < B)[None, :] & (columns < H)[:, None],
        other=0.0,
        cache_modifier=".cg",
    )
    acc = multiply(acc, w, x, PACKED)
    ends = block == K_BLOCKS - 1
    complete = ends
    if SPREAD:
        complete = ends & ((step < whole) | (step - whole >= K_BLOCKS - 1))
        ends = ends | (step == steps - 1)
    if ends:
        if complete:
            _finish(acc, at, x_ptr, b_ptr, s_ptr, B_HEAD_STRIDE, out_ptr, B, SCALED, RESIDUAL, HEADS, H, BLOCK_H,
                    BLOCK_B)  # fmt: skip
        elif SPREAD:
            second = (begin + step - whole) // K_BLOCKS - begin // K_BLOCKS
            tl.store(_part(parts_ptr, 2 * program + second, BLOCK_H, BLOCK_B), acc)
        acc = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
        if SPREAD:
            in_rest = tl.where(step + 1 == whole, TILES // programs * programs + begin // K_BLOCKS, at + 1)
            at = tl.where(step + 1 < whole, at + programs, in_rest)
        else:
            at += programs
    return acc, at


@triton.jit
def _add_parts(rest, x_ptr, b_ptr, s_ptr, B_HEAD_STRIDE: tl.constexpr, out_ptr, parts_ptr, tickets_ptr, B, programs,
               SCALED: tl.constexpr, RESIDUAL: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr,
               K_BLOCKS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    """Take a ticket of the last round's tile ``rest``, of which this program has stored a part; the last one sums."""
    TILES: tl.constexpr = HEADS * ((H + BLOCK_H - 1) // BLOCK_H)
    base = TILES // programs * programs
    blocks = (TILES - base) * K_BLOCKS
    first = taker(rest * K_BLOCKS, programs, blocks)
    last = taker(rest * K_BLOCKS + K_BLOCKS - 1, programs, blocks)
    tl.debug_barrier()  # all threads' stores come before the ticket, which one of them takes
    if tl.atomic_add(tickets_ptr + rest, 1, sem="acq_rel", scope="gpu") == last - first:
        tl.debug_barrier()
        acc = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
        for other in range(first, last + 1):
            _, begin, _ = program_share(other, programs, TILES, K_BLOCKS, True)
            slot = 2 * other + rest - begin // K_BLOCKS
            acc += tl.load(_part(parts_ptr, slot, BLOCK_H, BLOCK_B), cache_modifier=".cg")
        _finish(acc, base + rest, x_ptr, b_ptr, s_ptr, B_HEAD_STRIDE, out_ptr, B, SCALED, RESIDUAL, HEADS, H, BLOCK_H,
                BLOCK_B)  # fmt: skip
        tl.atomic_xchg(tickets_ptr + rest, 0, sem="relaxed", scope="gpu")


@triton.jit
def run_stage(first_w, x_ptr, x_stride, last_ptr, last_stride, w_ptr, W_HEAD_STRIDE: tl.constexpr, b_ptr, s_ptr,
              B_HEAD_STRIDE: tl.constexpr, out_ptr, parts_ptr, tickets_ptr, B, program, programs,
              SCALED: tl.constexpr, PACKED: tl.constexpr, SPREAD: tl.constexpr, RESIDUAL: tl.constexpr,
              HEADS: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,
              BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr):  # fmt: skip
    """This program's steps of one stage.  first_w: the weight tile of its first step, loaded before the barrier."""
    TILES: tl.constexpr = HEADS * ((H + BLOCK_H - 1) // BLOCK_H)
    K_BLOCKS: tl.constexpr = PARTS * ((H + BLOCK_K - 1) // BLOCK_K)
    whole, begin, end = program_share(program, programs, TILES, K_BLOCKS, SPREAD)
    steps = whole + end - begin
    if steps > 0:
        acc = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
        tile, block = tile_and_block(0, program, programs, whole, begin, TILES, K_BLOCKS, SPREAD)
        acc, at = _step(acc, tile, first_w, 0, steps, tile, block, x_ptr, x_stride, last_ptr, last_stride, b_ptr, s_ptr,
                        B_HEAD_STRIDE, out_ptr, parts_ptr, B, program, programs, whole, begin, SCALED, PACKED, SPREAD,
                        RESIDUAL, HEADS, H, PARTS, BLOCK_H, BLOCK_B, BLOCK_K)  # fmt: skip
        for step in tl.range(1, steps, num_stages=NUM_STAGES):
            tile, block = tile_and_block(step, program, programs, whole, begin, TILES, K_BLOCKS, SPREAD)
            w = weight_tile(w_ptr, W_HEAD_STRIDE, tile, block, HEADS, H, PARTS, BLOCK_H, BLOCK_K)
            acc, at = _step(acc, at, w, step, steps, tile, block, x_ptr, x_stride, last_ptr, last_stride, b_ptr, s_ptr,
                            B_HEAD_STRIDE, out_ptr, parts_ptr, B, program, programs, whole, begin, SCALED, PACKED,
                            SPREAD, RESIDUAL, HEADS, H, PARTS, BLOCK_H, BLOCK_B, BLOCK_K)  # fmt: skip
    if SPREAD:
        for rest in range(begin // K_BLOCKS, (end + K_BLOCKS - 1) // K_BLOCKS):
            if (begin < end) & ((rest * K_BLOCKS < begin) | (rest * K_BLOCKS + K_BLOCKS > end)):
                _add_parts(rest, x_ptr, b_ptr, s_ptr, B_HEAD_STRIDE, out_ptr, parts_ptr, tickets_ptr, B, programs,
                           SCALED, RESIDUAL, HEADS, H, K_BLOCKS, BLOCK_H, BLOCK_B)  # fmt: skip
