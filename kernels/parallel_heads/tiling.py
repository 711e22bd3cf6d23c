"""Tile sizes of the fused parallel heads: plain arithmetic, no Triton and no device needed."""

from __future__ import annotations

from dataclasses import dataclass, replace

MAX_BATCH = 32
"""Above it the kernel's inputs pass through the L2 as often as its weights, and the library's products are faster."""
BATCH_TILES = (16, 32)
_KEPT_BACK = 1024  # bytes of shared memory the driver takes for each resident program
# What the model of a stage's time rests on, of an H100: 3.05 TB/s of memory, at least 5.5 TB/s from the L2, and bytes
# on their way to each processor at which the memory is busy.
_L2_OVER_MEMORY = 1.8
_BYTES_NEEDED = 36 << 10
# What the memory would give while sums of tile parts pass through the L2: a store, a ticket and a load, some 2 us.
_BYTES_MISSED = 6 << 20


@dataclass(frozen=True)
class Device:
    """What the choice of tiles depends on."""

    processors: int
    shared_per_processor: int  # bytes
    shared_per_program: int  # bytes, the most one program may ask for
    native_fp8: bool = False  # of AMD's: converts e4m3fn in hardware
    amd: bool = False
    packed: bool = True  # runs PTX


@dataclass(frozen=True)
class Tiling:
    """Sizes of one launch: weight tiles ``[block_h, block_k]``, batch padded to ``block_b``."""

    block_h: int
    block_b: int
    block_k: int
    num_stages: int
    num_warps: int
    programs: int
    native_fp8: bool = False
    amd: bool = False
    packed: bool = False  # 8-bit codes are decoded four at a time, in PTX
    spread: bool = False  # the last round's tiles are dealt out by K blocks

    def shared_bytes(self, weight_bytes: int, activation_bytes: int) -> int:
        """Upper estimate of one program's shared memory, checked against compiled kernels by the ahead-of-time test.

        The pipeline holds one pair of tiles less than its depth; with tiles of 64 rows, which Hopper's asynchronous
        matrix instructions read from shared memory, one more, and the first tile of a stage beside them.  On AMD the
        tiles on their way are in registers.
        """
        pair = self.block_k * (self.block_h * weight_bytes + self.block_b * activation_bytes)
        return int(pair * (self.num_stages + (1.25 if self.block_h == 64 and not self.amd else -0.5)))

    def bytes_in_flight(self, weight_bytes: int) -> int:
        """Weights of one program that are on their way while it multiplies."""
        return (self.num_stages - 1) * self.block_h * self.block_k * weight_bytes

    def traffic(self, weight_bytes: int, activation_bytes: int) -> float:
        """Bytes that pass through the L2 for a byte of weights: every tile of rows reads the whole input again."""
        return 1 + self.block_b * activation_bytes / (self.block_h * weight_bytes)


def batch_tile(batch: int) -> int:
    """The padded batch: a power of two of at least 16, which is what matrix instructions take."""
    return max(16, 1 << (batch - 1).bit_length())


def balance(rows: int, heads: int, block_h: int, programs: int) -> float:
    """Share of the programs' time in use when whole tiles are dealt out in turn: 1 is perfect."""
    tiles = heads * -(-rows // block_h)
    return tiles / (-(-tiles // programs) * programs)


def stage_time(
    rows: int, heads: int, tiling: Tiling, weight_bytes: int, activation_bytes: int, device: Device
) -> float:
    """A stage's time over that of its weights at the memory's full speed: a model, for comparing tilings.

    Programs deal out whole rounds; in the last one, perhaps of few tiles, fewer bytes are on their way, unless it is
    spread over all programs, whose sums then have to meet.  Not below what the L2 takes for weights and inputs.
    """
    tiles = heads * -(-rows // tiling.block_h)
    needed = _BYTES_NEEDED * device.processors
    time = 0.0
    for count in (tiles - tiles % tiling.programs, tiles % tiling.programs):
        busy = tiling.programs if tiling.spread else min(count, tiling.programs)
        time += count / min(1.0, busy * tiling.bytes_in_flight(weight_bytes) / needed) if count else 0.0
    if tiling.spread:
        time += _BYTES_MISSED / (tiling.block_h * rows * weight_bytes)
    return max(time / tiles, tiling.traffic(weight_bytes, activation_bytes) / _L2_OVER_MEMORY)


def _shapes(weight_bytes: int, amd: bool) -> tuple[tuple[int, ...], int]:
    """Rows to choose from and K block: rows of 128 to 512 bytes, tiles that the registers hold without spilling.

    8-bit weights have 64 rows, so that each is in one warp alone and decoded once.
    """
    if weight_bytes == 4:
        return (16,), 32
    if weight_bytes == 1:
        return (64,), 256 if amd else 128
    return (64, 32, 16), 128


def choose_tiling(
    batch: int, heads: int, hidden: int, weight_bytes: int, activation_bytes: int, device: Device
) -> Tiling:
    """The fastest of `fitting_tilings` by `stage_time`; the same for all batches of a tile.

    Of those within 2 %: whole tiles alone, then two programs per processor, of which one loads while the other stores
    or waits, then more rows.
    """
    found = fitting_tilings(batch, heads, hidden, weight_bytes, activation_bytes, device)
    if len(found) == 1:
        return found[0]
    times = {one: stage_time(hidden, heads, one, weight_bytes, activation_bytes, device) for one in found}
    near = [one for one in found if times[one] <= 1.02 * min(times.values())]
    return max(near, key=lambda one: (not one.spread, one.programs, one.block_h))


def fitting_tilings(
    batch: int, heads: int, hidden: int, weight_bytes: int, activation_bytes: int, device: Device
) -> list[Tiling]:
    """Every tiling to choose from, each with the deepest pipeline that fits; whole tiles before spread ones.

    On AMD, where a launch has no barrier inside, there is one: a program for each tile, a second tile on its way.
    Raises: ValueError where none fits.
    """
    block_b = batch_tile(batch)
    sizes = weight_bytes, activation_bytes
    rows, block_k = _shapes(weight_bytes, device.amd)
    if device.amd:
        block_h = rows[0]
        return [Tiling(block_h, block_b, block_k, 2, 4, heads * -(-hidden // block_h), device.native_fp8, True, False)]
    found: list[Tiling] = []
    for block_h in rows:
        for per_processor in (2, 1):
            for num_stages in (5, 4, 3, 2):
                programs = device.processors * per_processor
                tiling = Tiling(block_h, block_b, block_k, num_stages, 4, programs, packed=device.packed)
                shared = tiling.shared_bytes(*sizes)
                fits = per_processor * (shared + _KEPT_BACK) <= device.shared_per_processor
                if fits and shared <= device.shared_per_program and (num_stages > 2 or per_processor == 1):
                    rest = heads * -(-hidden // block_h) % programs
                    found += (tiling, replace(tiling, spread=True))[: 2 if rest else 1]
                    break
    if not found:
        raise ValueError(
            f"no tile of H={hidden}, batch {batch} fits {device.shared_per_program} bytes of shared memory"
        )
    return found
