"""Tensors of a checkpoint held to the names, shapes and types that they should have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from vllm_gumiho.checkpoint.files import TensorInfo, some
from vllm_gumiho.errors import CheckpointError

SCALE = "_scale"
D2T = "d2t"
EMBEDDING = "embed_tokens.weight"
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
"""Types of matrices that have a scale a row."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

UNROUNDED = frozenset({"fc.weight"})
"""Matrices that are not rounded to 8 bits: ``fc`` reads an embedding and a feature of another size, and under one scale
a row the bundled head's lost 14 % of its accepted tokens (docs/results/draft-weights.md)."""

Shape = tuple[int | None, ...]


def most_common_size(infos: dict[str, TensorInfo], places: Iterable[tuple[str, int]]) -> int:
    """The size that most of these (tensor, axis) have, so that one odd tensor is the one named; 0 without any."""
    shapes = ((infos[name].shape, axis) for name, axis in places if name in infos)
    sizes = Counter(shape[axis] for shape, axis in shapes if len(shape) > axis)
    return sizes.most_common(1)[0][0] if sizes else 0


def check_tensors(where: Path, infos: dict[str, TensorInfo], wanted: dict[str, Shape], title: str, said: str) -> None:
    """Hold the tensors to ``wanted`` shapes (None: any size).  The embedding and ``d2t`` may be there or not.

    title: the drafter's name; said: what is known of its sizes, for messages.

    Raises: CheckpointError naming tensors that are missing, unknown, misshapen or of a wrong type.
    """
    missing = sorted(set(wanted) - set(infos))
    if missing:
        raise CheckpointError(f"{where}: tensors are missing: {some(missing)}; fetch the checkpoint again")
    scales = {name + SCALE for name, info in infos.items() if info.dtype in EIGHT_BITS}
    unknown = sorted(set(infos) - set(wanted) - scales)
    if unknown:
        raise CheckpointError(f"{where}: no {title} drafter has tensors {some(unknown)}; nothing is dropped silently")
    for name in sorted(wanted):
        expected, info = wanted[name], infos[name]
        fits = len(info.shape) == len(expected) and all(
            e in (None, size) for e, size in zip(expected, info.shape, strict=True)
        )
        if not fits or 0 in info.shape:
            shown = ", ".join("any" if e is None else str(e) for e in expected)
            raise CheckpointError(f"{where}: {name} has shape {list(info.shape)}, expected [{shown}] ({said})")
        _check_type(where, name, infos)


def _check_type(where: Path, name: str, infos: dict[str, TensorInfo]) -> None:
    info = infos[name]
    if name == D2T:
        if info.dtype not in (torch.int64, torch.int32):
            raise CheckpointError(f"{where}: {D2T} is {info.dtype}; expected int64 offsets to target token ids")
    elif info.dtype in EIGHT_BITS:
        scale = infos.get(name + SCALE)
        if len(info.shape) != 2 or scale is None or scale.shape != info.shape[:1] or scale.dtype not in _FLOATS:
            raise CheckpointError(
                f"{where}: {name} is {_short(info.dtype)} and needs a floating-point {name}{SCALE} of shape "
                f"[{info.shape[0]}]"
            )
    elif info.dtype not in _FLOATS:
        raise CheckpointError(
            f"{where}: {name} is {info.dtype}; expected float32, float16, bfloat16, float64, or int8 or float8_e4m3fn "
            "with a scale"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def quantise(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A matrix as int8 with one scale a row, under its name and that of the scale; other floats and `UNROUNDED`
    as bfloat16."""
    if tensor.ndim != 2 or name in UNROUNDED:
        yield name, tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        return
    scale = tensor.float().abs().amax(dim=1).clamp_min(1e-12) / 127
    yield name, (tensor.float() / scale[:, None]).round().to(torch.int8)
    yield name + SCALE, scale


def target_ids(d2t: Tensor, vocab_size: int, where: str) -> Tensor:
    """Target token ids of the draft tokens, ``[Vd]`` int64, from their offsets.

    Raises: CheckpointError for ids that repeat, fall, or lie outside the target's vocabulary.
    """
    ids = torch.arange(d2t.shape[0]) + d2t.to("cpu", torch.int64)
    if ids[0] < 0 or ids[-1] >= vocab_size or not (ids[1:] > ids[:-1]).all():
        raise CheckpointError(
            f"{where}: {D2T} points outside the target's vocabulary of {vocab_size} tokens, or its token ids do not "
            "rise; use a checkpoint trained for this target, or fetch it again"
        )
    return ids
