"""Row tiles of the LM head's argmax: plain arithmetic, no Triton needed."""

from __future__ import annotations

MAX_ROWS = 64
"""Above it the rows pass through the L2 as often as the weights, once a tile of tokens: logits by the library."""
ROW_TILES = (16, 32, 64)


def row_tile(rows: int) -> int:
    """The padded number of rows: a power of two of at least 16, which is what matrix instructions take."""
    return max(16, 1 << (rows - 1).bit_length())


def row_tiles(most: int) -> list[int]:
    """Every tile that up to ``most`` rows reach, of those that the kernel takes."""
    return [tile for tile in ROW_TILES if tile <= row_tile(most)]
