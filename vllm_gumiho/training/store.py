"""Target features on disk: one file that only grows, read through a memory map.

Two files a target, named by its fingerprint: ``*.features`` holds bfloat16 vectors end to end, ``*.index`` a record a
sequence of tokens: 16 bytes of its SHA-256, first vector, number of vectors, their CRC-32.  Features depend on the
tokens before alone, so a sequence's are the same in whatever row it is packed.  Several processes may read and append
at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

RECORD = struct.Struct("<16sQQI")


def key_of(tokens: np.ndarray) -> bytes:
    """16 bytes that name a sequence of token ids."""
    return hashlib.sha256(np.ascontiguousarray(tokens, np.int64).tobytes()).digest()[:16]


class FeatureStore:
    """Features ``[tokens, width]`` of sequences, by `key_of` their tokens."""

    def __init__(self, folder: Path, name: str, width: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.width, self.device = width, torch.device("cpu")
        self._data, self._index = folder / f"{name}.features", folder / f"{name}.index"
        for file in (self._data, self._index):
            file.touch()
        self._places: dict[bytes, tuple[int, int, int]] = {}
        # Records whose vectors this process has found whole.
        self._whole: set[bytes] = set()
        self._read = 0
        self._map = np.empty((0, width), np.uint16)

    def __contains__(self, key: bytes) -> bool:
        """Whether whole features of these tokens are there, from this process or another."""
        if key in self._whole:
            return True
        if key not in self._places or not self._is_whole(key):
            # Perhaps another process has added them since.
            self._refresh()
            if key not in self._places or not self._is_whole(key):
                return False
        self._whole.add(key)
        return True

    def _is_whole(self, key: bytes) -> bool:
        first, count, checksum = self._places[key]
        return first + count <= self._vectors() and zlib.crc32(self._vectors_at(first, count).tobytes()) == checksum

    def _vectors_at(self, first: int, count: int) -> np.ndarray:
        if first + count > len(self._map):
            # Pages that could be written would have to fit into memory, all of them.
            self._map = np.memmap(self._data, np.uint16, "r", shape=(self._vectors(), self.width))
        return self._map[first : first + count]

    def __len__(self) -> int:
        self._refresh()
        return len(self._places)

    def read(self, key: bytes) -> Tensor:
        """Features ``[tokens, width]``, bfloat16, a copy.  Raises: KeyError where there are none."""
        if key not in self:
            raise KeyError(key.hex())
        first, count, _ = self._places[key]
        return torch.from_numpy(self._vectors_at(first, count).copy()).view(torch.bfloat16)

    def append(self, items: Iterable[tuple[bytes, Tensor]]) -> None:
        """Add features ``[tokens, width]`` of sequences.  What a kill cuts off is not whole, and computed again."""
        with self._data.open("ab") as data, self._index.open("ab") as index:
            fcntl.flock(index, fcntl.LOCK_EX)
            size = 2 * self.width
            # A kill may have cut the file inside a vector or a record: what follows begins at a whole one again.
            data.truncate(-(-data.seek(0, os.SEEK_END) // size) * size)
            index.truncate(index.seek(0, os.SEEK_END) // RECORD.size * RECORD.size)
            first, records = data.seek(0, os.SEEK_END) // size, []
            for key, features in items:
                values = features.detach().to("cpu", torch.bfloat16).contiguous()
                content = values.view(torch.uint16).numpy().tobytes()
                data.write(content)
                records.append(RECORD.pack(key, first, len(values), zlib.crc32(content)))
                first += len(values)
            data.flush()
            os.fdatasync(data.fileno())
            index.write(b"".join(records))

    def _vectors(self) -> int:
        return self._data.stat().st_size // (2 * self.width)

    def _refresh(self) -> None:
        with self._index.open("rb") as index:
            index.seek(self._read)
            new = index.read()
        new = new[: len(new) // RECORD.size * RECORD.size]
        self._read += len(new)
        for key, *place in RECORD.iter_unpack(new):
            self._places[key] = tuple(place)


class KeptFeatures:
    """Features as `FeatureStore` has them, in a device's memory and for one process, up to a limit."""

    def __init__(self, width: int, device: torch.device, limit: float):
        """limit: bytes; what would be above them is not kept."""
        self.width, self.device, self.left = width, device, limit
        self._kept: dict[bytes, Tensor] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    def read(self, key: bytes) -> Tensor:
        """Features ``[tokens, width]``, bfloat16.  Raises: KeyError where there are none."""
        return self._kept[key]

    def append(self, items: Iterable[tuple[bytes, Tensor]]) -> None:
        """Keep features ``[tokens, width]`` of sequences, as long as there is room."""
        for key, features in items:
            size = 2 * features.numel()
            if size <= self.left and key not in self._kept:
                # A copy: what it is a part of is of a whole pass.
                self._kept[key] = features.detach().to(self.device, torch.bfloat16, copy=True)
                self.left -= size
