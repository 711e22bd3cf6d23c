"""Weight and config files of a checkpoint: what is in them, without trusting them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_gumiho.errors import CheckpointError

_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "F64": torch.float64,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


def weight_files(path: Path) -> tuple[list[Path], set[str]]:
    """Files that hold the tensors, and the tensor names that an index of them promises."""
    if path.is_file():
        return [path], set()
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder; give a checkpoint or a hub name")
    for index_name, pattern in (
        ("model.safetensors.index.json", "*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        index = path / index_name
        if index.exists():
            places = _read_index(index)
            return sorted({path / shard for shard in places.values()}), set(places)
        if files := sorted(path.glob(pattern)):
            return files, set()
    raise CheckpointError(f"{path}: no *.safetensors and no pytorch_model*.bin in it; is it a checkpoint?")


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name to file name in the index's own folder.  (The files may be links, as in the hub's cache.)"""
    places = (read_config(index) or {}).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: has no weight_map; fetch it again, or remove it if there is only one file")
    outside = [shard for shard in places.values() if not isinstance(shard, str) or Path(shard).name != shard]
    if outside:
        raise CheckpointError(f"{index}: weight_map names {outside[0]!r}, which is no file of the same folder")
    missing = sorted({shard for shard in places.values() if not (index.parent / shard).is_file()})
    if missing:
        raise CheckpointError(f"{index}: shards are missing: {some(missing)}; fetch the checkpoint again")
    return places


def read_config(file: Path) -> dict[str, Any] | None:
    """Content of a JSON object file, None where there is no file.  Raises: CheckpointError."""
    if not file.exists() and not file.is_symlink():
        return None
    _check_regular(file)
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); fetch it again or remove it") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {type(content).__name__}, not an object; fetch it again or remove it")
    return content


def _check_regular(file: Path) -> None:
    """Refuse what is no file: a pipe or a device would be read for ever."""
    if not file.is_file():
        reason = "a link to nowhere" if file.is_symlink() and not file.exists() else "not a regular file"
        raise CheckpointError(f"{file}: is {reason}; fetch the checkpoint again")


def _load_pickle(file: Path) -> dict[str, Tensor]:
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it wants {foreign[1]}, and only tensors are read" if foreign else type(error).__name__
        raise CheckpointError(
            f"{file}: not readable as a file of tensors ({reason}); fetch it again, or have its author save it as "
            "safetensors"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {type(content).__name__}; expected a state dict of named tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise CheckpointError(
                f"{file}: its entry {name!r} is {type(value).__name__}; expected a state dict of named dense tensors"
            )
    return content


def list_tensors(file: Path) -> dict[str, TensorInfo]:
    """Names, shapes and types of the tensors in a weight file.  Raises: CheckpointError."""
    _check_regular(file)
    if file.suffix != ".safetensors":
        return {name: TensorInfo(tuple(t.shape), t.dtype, file) for name, t in _load_pickle(file).items()}
    try:
        with safe_open(file, "pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            return {
                name: TensorInfo(tuple(s.get_shape()), _DTYPES.get(s.get_dtype(), torch.bool), file)
                for name, s in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error}); fetch it again") from error


def read_tensors(file: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the named tensors one at a time.  Raises: CheckpointError."""
    if file.suffix != ".safetensors":
        content = _load_pickle(file)
        yield from ((name, content[name]) for name in names)
        return
    try:
        with safe_open(file, "pt") as handle:
            for name in names:
                yield name, handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error}); fetch it again") from error


def some(names: list[str], most: int = 6) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
