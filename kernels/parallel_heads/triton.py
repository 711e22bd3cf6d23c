# ruff: noqa: N803, N806 - constants of a kernel are upper case in Triton
# mypy: allow-untyped-defs
"""All stages of the parallel heads in one launch: the weights of a stage are split over every program on the device.

    z_0[i] =            SiLU(W[i,0] m      + b[i,0])     m [B, S*H],  W[i,0] [H, S*H]
    z_j[i] = z_j-1[i] + SiLU(W[i,j] z_j-1  + b[i,j])     j = 1..5,    W[i,j] [H, H]

Grid: ``(programs,)``, all of them resident at once.  A stage is ``n * ceil(H / BLOCK_H)`` tiles of output rows, dealt
out as `stage` says; a program walks over its tiles and their K blocks in one flat loop, so that the loads of the next
tile are under way while the present one ends.  Between two stages every program waits for every other.

m comes as two blocks of columns, ``rest [B, (S-1)*H]`` and ``last [B, H]``, each with a row stride of its own: o_S and
the vectors before it are made by different passes, and no concatenation of them is written.  z lies as ``[B, n, H]``:
the rows of one request together, as the LM head wants them.

Barrier: ``counters[j]`` counts the programs that finished stage j.  A program's stores are made visible by a barrier of
its threads and then one add with release order by one thread; the wait polls with acquire order and is followed by a
barrier of the threads.  Program 0 zeroes ``counters[1..4]`` before it arrives at the first barrier, which nobody passes
before that, and ``counters[0]`` behind the second, which nobody reaches who still waits at the first: whatever a launch
finds in them, the next one, or the next replay of a CUDA graph, is right.  A wait gives up after MAX_POLLS polls and
sets ``counters[5]`` for good; the launch, and each one that finds it set, ends without waiting, with a wrong z.

The same function runs one stage per launch (``BARRIER`` false): the order of launches then takes the barrier's place.
With programmatic dependent launch (``DEPENDENT``) a stage's programs come while the stage before still runs, and wait
for it with ``griddepcontrol.wait``: no counters, and no need for all programs to be resident.

Before either wait, on NVIDIA, a program asks the L2 for its next 64 KB of weights (``AHEAD``), which depend on nobody.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_gumiho.kernels.eight_bit.decode import stored_codes
from vllm_gumiho.kernels.parallel_heads.reference import GAVE_UP, HEAD_STAGES, HeadScales, HeadWeights
from vllm_gumiho.kernels.parallel_heads.stage import ask_ahead, program_share, run_stage, tile_and_block, weight_tile
from vllm_gumiho.kernels.parallel_heads.tiling import Tiling

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # another Triton: no stage is launched ahead of the one before's end
    gdc_launch_dependents = gdc_wait = None

_STAGES: tl.constexpr = tl.constexpr(HEAD_STAGES)
_GAVE_UP: tl.constexpr = tl.constexpr(GAVE_UP)
# A poll is a round trip to the L2, half a microsecond or more: some tens of milliseconds.  A stage takes some tens of
# microseconds.
MAX_POLLS = 1 << 15
# Weights of a program that are asked for before a wait: with 264 programs a third of an H100's L2.
BYTES_AHEAD = 64 << 10


@triton.jit
def _arrive(counter_ptr):
    """Tell the others that all this program's stores so far may be read."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _wait(counters_ptr, stage, programs, gave_up, MAX_POLLS: tl.constexpr):
    """Return when all programs have arrived, whose stores are visible to every thread then; or that it gave up.

    gave_up: 1 where a wait has given up before: it is not tried again.
    """
    arrived = tl.atomic_add(counters_ptr + stage, 0, sem="acquire", scope="gpu")
    polls = 1 + gave_up * MAX_POLLS
    while (arrived < programs) & (polls < MAX_POLLS):
        arrived = tl.atomic_add(counters_ptr + stage, 0, sem="acquire", scope="gpu")
        polls += 1
    if arrived < programs:
        tl.atomic_xchg(counters_ptr + _GAVE_UP, 1, sem="relaxed", scope="gpu")
        gave_up = 1
    tl.debug_barrier()
    return gave_up


@triton.jit(do_not_specialize=["B", "begin", "end"])
def parallel_heads_kernel(rest_ptr, last_ptr, first_w_ptr, first_b_ptr, w_ptr, b_ptr, first_s_ptr, s_ptr, z_ptr,
                          counters_ptr, parts_ptr, tickets_ptr, rest_stride, last_stride, B, begin, end,
                          FIRST: tl.constexpr, BARRIER: tl.constexpr, SCALED: tl.constexpr, PACKED: tl.constexpr,
                          SPREAD: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr,
                          BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
                          NUM_STAGES: tl.constexpr, MAX_POLLS: tl.constexpr, AHEAD: tl.constexpr,
                          DEPENDENT: tl.constexpr):  # fmt: skip
    """Stage 0 where FIRST, then the stages begin..end-1, with a barrier before each but the first one run.

    rest [B, (PARTS-1)*H] and last [B, H] with the row strides given; weights, biases and scales as in `HeadWeights` and
    `HeadScales`; z [2, B, HEADS, H]: stage j writes z[j % 2] and reads the other half; counters [6] int32.  Where
    SPREAD, parts [2 * programs, BLOCK_H, BLOCK_B] float32, and tickets [programs] int32, which are zero.
    """
    TILES: tl.constexpr = HEADS * ((H + BLOCK_H - 1) // BLOCK_H)
    PART_BLOCKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    half = B * (HEADS * H)
    gave_up = 0
    if DEPENDENT:  # the next stage's programs may come
        gdc_launch_dependents()
    if BARRIER:
        gave_up = tl.where(tl.load(counters_ptr + _GAVE_UP, cache_modifier=".cg") != 0, 1, 0)
        if program == 0:
            for i in range(1, _STAGES - 1):
                tl.atomic_xchg(counters_ptr + i, 0, sem="relaxed", scope="gpu")
    if FIRST:
        whole, run, _ = program_share(program, programs, TILES, PARTS * PART_BLOCKS, SPREAD)
        tile, block = tile_and_block(0, program, programs, whole, run, TILES, PARTS * PART_BLOCKS, SPREAD)
        w = weight_tile(first_w_ptr, PARTS * H * H, tile, block, HEADS, H, PARTS, BLOCK_H, BLOCK_K)
        if DEPENDENT:
            if AHEAD:
                ask_ahead(first_w_ptr, PARTS * H * H, tile, block, HEADS, H, PARTS, BLOCK_H, BLOCK_K, AHEAD)
            gdc_wait()
        run_stage(w, rest_ptr, rest_stride, last_ptr, last_stride, first_w_ptr, PARTS * H * H, first_b_ptr,
                  first_s_ptr, H, z_ptr, parts_ptr, tickets_ptr, B, program, programs, SCALED, PACKED, SPREAD, False,
                  HEADS, H, PARTS, BLOCK_H, BLOCK_B, BLOCK_K, NUM_STAGES)  # fmt: skip
        if BARRIER:
            _arrive(counters_ptr)
    whole, run, _ = program_share(program, programs, TILES, PART_BLOCKS, SPREAD)
    tile, block = tile_and_block(0, program, programs, whole, run, TILES, PART_BLOCKS, SPREAD)
    for stage in range(begin, end):
        stage_w_ptr = w_ptr + (stage - 1) * (H * H)
        # Weights depend on no other program: the first tile comes in while the slower programs finish.
        w = weight_tile(stage_w_ptr, (_STAGES - 1) * H * H, tile, block, HEADS, H, 1, BLOCK_H, BLOCK_K)
        if AHEAD and (BARRIER or DEPENDENT):
            ask_ahead(stage_w_ptr, (_STAGES - 1) * H * H, tile, block, HEADS, H, 1, BLOCK_H, BLOCK_K, AHEAD)
        if DEPENDENT:
            gdc_wait()
        if BARRIER:
            gave_up = _wait(counters_ptr, stage - 1, programs, gave_up, MAX_POLLS)
            if (stage == 2) & (program == 0):
                tl.atomic_xchg(counters_ptr, 0, sem="relaxed", scope="gpu")
        x_ptr = z_ptr + (stage - 1) % 2 * half
        run_stage(w, x_ptr, HEADS * H, x_ptr, HEADS * H, stage_w_ptr, (_STAGES - 1) * H * H, b_ptr + (stage - 1) * H,
                  s_ptr + (stage - 1) * H, (_STAGES - 1) * H, z_ptr + stage % 2 * half, parts_ptr, tickets_ptr, B,
                  program, programs, SCALED, PACKED, SPREAD, True, HEADS, H, 1, BLOCK_H, BLOCK_B, BLOCK_K,
                  NUM_STAGES)  # fmt: skip
        if BARRIER and stage < end - 1:
            _arrive(counters_ptr + stage)


class LaunchArgs(NamedTuple):
    """What one launch is given beside the tensors."""

    begin: int
    end: int
    first: bool
    barrier: bool


def launch_sequence(fused: bool) -> list[LaunchArgs]:
    """The launches that make up all six stages: one with barriers inside, or six in order."""
    if fused:
        return [LaunchArgs(1, HEAD_STAGES, True, True)]
    return [LaunchArgs(1, 1, True, False), *(LaunchArgs(j, j + 1, False, False) for j in range(1, HEAD_STAGES))]


def parallel_heads_triton(
    rest: Tensor,
    last: Tensor,
    weights: HeadWeights,
    scales: HeadScales | None,
    tiling: Tiling,
    counters: Tensor | None,
    dependent: bool = False,
) -> Tensor:
    """m as ``rest [B, (S-1)*H]`` and ``last [B, H]`` -> ``z [n, B, H]`` in their dtype; B <= ``tiling.block_b``.

    z is a view of ``[B, n, H]`` in memory.  counters: six int32 on the same device for the single launch with barriers,
    which must not run twice at once with the same ones; None: one launch per stage.
    """
    heads, hidden, first_k = weights.first_weight.shape
    batch = last.shape[0]
    shapes = tuple(rest.shape), tuple(last.shape)
    if batch > tiling.block_b or shapes != ((batch, first_k - hidden), (batch, hidden)) or hidden % 16:
        raise ValueError(f"{shapes} do not fit {heads} heads of H={hidden} and a batch tile {tiling.block_b}")
    if not all(t.is_contiguous() for t in [*weights, *(scales or ())]):
        raise ValueError("the parallel heads kernel takes contiguous weights")
    if last.stride(1) != 1 or (rest.shape[1] and rest.stride(1) != 1):
        raise ValueError("the parallel heads kernel takes inputs whose columns lie side by side")
    if counters is not None and last.device.type == "cpu" and tiling.programs > 1:
        raise ValueError("the interpreter runs programs one after the other: with barriers it can run only one")
    weights = weights._replace(
        first_weight=stored_codes(weights.first_weight, tiling.native_fp8),
        weight=stored_codes(weights.weight, tiling.native_fp8),
    )
    if dependent and gdc_wait is None:
        raise ValueError("this Triton has no programmatic dependent launch")
    z = last.new_empty(2, batch, heads, hidden)
    first_s, s = scales or (z, z)  # never read where SCALED is false
    parts = tickets = z  # never read where SPREAD is false
    if tiling.spread:
        parts = z.new_empty(2 * tiling.programs, tiling.block_h, tiling.block_b, dtype=torch.float32)
        tickets = z.new_zeros(tiling.programs, dtype=torch.int32)
    for launch in launch_sequence(counters is not None):
        parallel_heads_kernel[(tiling.programs,)](
            rest, last, weights.first_weight, weights.first_bias, weights.weight, weights.bias, first_s, s, z,
            z if counters is None else counters, parts, tickets, rest.stride(0), last.stride(0), batch, launch.begin,
            launch.end, launch.first, launch.barrier, scales is not None, tiling.packed, tiling.spread, heads, hidden,
            first_k // hidden, tiling.block_h, tiling.block_b, tiling.block_k, tiling.num_stages, MAX_POLLS,
            BYTES_AHEAD if tiling.packed else 0, dependent, num_warps=tiling.num_warps,
            launch_cooperative_grid=launch.barrier, **({"launch_pdl": True} if dependent else {}),
        )  # fmt: skip
    return z[(HEAD_STAGES - 1) % 2].transpose(0, 1)
