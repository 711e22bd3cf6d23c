"""Tile sizes of the fused parallel heads: plain arithmetic, no Triton and no device needed."""

from __future__ import annotations

from dataclasses import dataclass

MAX_BATCH = 64
_KEPT_BACK = 1024  # bytes of shared memory the driver takes for each resident program


@dataclass(frozen=True)
class Device:
    """What the choice of tiles depends on."""

    processors: int
    shared_per_processor: int  # bytes
    shared_per_program: int  # bytes, the most one program may ask for
    native_fp8: bool = True  # converts e4m3 in hardware


@dataclass(frozen=True)
class Tiling:
    """Sizes of one launch: weight tiles ``[block_h, block_k]``, batch padded to ``block_b``."""

    block_h: int
    block_b: int
    block_k: int
    num_stages: int
    num_warps: int
    programs: int
    native_fp8: bool = True

    def shared_bytes(self, weight_bytes: int, activation_bytes: int) -> int:
        """Upper estimate of one program's shared memory, checked against compiled kernels by the ahead-of-time test.

        The pipeline holds one pair of tiles less than its depth; with tiles of 64 rows, which Hopper's asynchronous
        matrix instructions read from shared memory, one more, and the first tile of a stage beside them.
        """
        pair = self.block_k * (self.block_h * weight_bytes + self.block_b * activation_bytes)
        return int(pair * (self.num_stages + (1.25 if self.block_h == 64 else -0.5)))


def batch_tile(batch: int) -> int:
    """The padded batch: a power of two of at least 16, which is what matrix instructions take."""
    return max(16, 1 << (batch - 1).bit_length())


def balance(rows: int, heads: int, block_h: int, processors: int) -> float:
    """Share of the processors' time in use when whole tiles are dealt out: 1 is perfect."""
    tiles = heads * -(-rows // block_h)
    return tiles / (-(-tiles // processors) * processors)


def _shapes(weight_bytes: int, block_b: int) -> tuple[tuple[int, ...], int]:
    """Rows to choose from and K block: rows of 128 to 512 bytes, tiles that the registers hold without spilling."""
    if weight_bytes == 4:
        return (16,), 32
    if weight_bytes == 1:
        return (32, 16), 256 if block_b <= 32 else 128
    return (64, 32, 16) if block_b <= 32 else (64, 32), 128


def choose_tiling(
    batch: int, heads: int, hidden: int, weight_bytes: int, activation_bytes: int, device: Device
) -> Tiling:
    """Tile rows that share out evenly (larger ones where two do about equally), then the deepest pipeline that fits.

    Two programs per processor where the shared memory allows: one loads while the other stores or waits.
    """
    block_b = batch_tile(batch)
    rows, block_k = _shapes(weight_bytes, block_b)
    shares = {h: balance(hidden, heads, h, device.processors) for h in rows}
    for block_h in sorted(rows, key=lambda h: (shares[h] < max(shares.values()) - 0.02, -h)):
        for per_processor in (2, 1):
            for num_stages in (5, 4, 3, 2):
                tiling = Tiling(
                    block_h, block_b, block_k, num_stages, 4, device.processors * per_processor, device.native_fp8
                )
                shared = tiling.shared_bytes(weight_bytes, activation_bytes)
                fits = per_processor * (shared + _KEPT_BACK) <= device.shared_per_processor
                if fits and shared <= device.shared_per_program and (num_stages > 2 or per_processor == 1):
                    return tiling
    raise ValueError(f"no tile of H={hidden}, batch {batch} fits {device.shared_per_program} bytes of shared memory")
