"""Every checkpoint format, read and written here and nowhere else.

Formats: the released layout (``pytorch_model.bin`` or safetensors, sharded or not, with or without config.json)
and the speculators layout (safetensors and a config.json with ``speculators_model_type``).  Tensor names are the
released ones in both.  A weight may be int8 or float8 e4m3 with a ``<name>_scale`` of one value a row.  Which
drafter it is, and the numbers of its parts, come from the tensors, never from a config.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vllm_gumiho.checkpoint.files import (
    TensorInfo,
    list_tensors,
    read_config,
    read_tensors,
    some,
    weight_files,
)
from vllm_gumiho.checkpoint.integrity import (
    SHA256,
    check_archive,
    check_checksums,
    check_digest,
    check_place,
    checksums,
)
from vllm_gumiho.checkpoint.tensors import D2T, EMBEDDING, SCALE, UNROUNDED, quantise, target_ids
from vllm_gumiho.drafters import DEFAULT, DRAFTERS, Drafter, Sizes
from vllm_gumiho.drafters.speculators_config import TYPE_KEY, check_config, speculators_config
from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.files import sha256_of, whole, write_json
from vllm_gumiho.kernels.eight_bit import EIGHT_BIT, is_eight_bit, quantise_rows

LOAD_FORMAT = "gumiho"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: names and shapes are known, no weight is in memory.  Made by `open_checkpoint`."""

    path: Path
    drafter: Drafter
    layout: str
    config: dict[str, Any] | None
    infos: dict[str, TensorInfo]
    sizes: Sizes

    @property
    def verifier(self) -> str | None:
        """Name or path of the target the checkpoint says it was trained for."""
        verifier = ((self.config or {}).get("speculators_config") or {}).get("verifier") or {}
        return verifier.get("name_or_path")

    @property
    def layer_config(self) -> dict[str, Any]:
        """Llama config of the draft layers, as far as the checkpoint has one."""
        config: Mapping[str, Any] = self.config or {}
        if TYPE_KEY in config:
            config = config.get("transformer_layer_config") or {}
        else:
            config = self.drafter.layer_config(config)
        return {key: value for key, value in config.items() if value is not None}

    @property
    def eight_bit(self) -> str | None:
        """``int8`` or ``fp8`` where its matrices are kept so, by most of them."""
        names = {dtype: name for name, dtype in EIGHT_BIT.items()}
        found = Counter(names[info.dtype] for info in self.infos.values() if info.dtype in names)
        return found.most_common(1)[0][0] if found else None

    def rows(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """As `tensors`, but matrices as 8-bit rows of ``dtype``, each with ``<name>_scale`` ``[N, 1]`` float32.

        Rows that the checkpoint has in this dtype are taken as they are, those of `UNROUNDED` are widened.
        """
        for name, tensor in self.tensors(keep=dtype, widened=UNROUNDED):
            if name.endswith(SCALE):
                yield name, tensor.float()[:, None]
            elif tensor.dtype == dtype or tensor.ndim != 2 or name in UNROUNDED:
                yield name, tensor
            else:
                codes, scale = quantise_rows(tensor, dtype)
                yield name, codes
                yield name + SCALE, scale[:, None]

    def tensors(self, keep: torch.dtype | None = None, widened: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, tensor)`` one at a time, 8-bit weights widened to float32 but for those of dtype ``keep``.

        widened: names that are widened all the same.

        The target's embedding, which released checkpoints carry a copy of, is left out.

        Raises: CheckpointError for a tensor that cannot be read or holds values that are not finite.
        """
        for file in sorted({info.file for info in self.infos.values()}):
            names = [name for name, info in self.infos.items() if info.file == file and name != EMBEDDING]
            for name, tensor in read_tensors(file, names):
                matrix = name.removesuffix(SCALE)
                kept = None if matrix in widened else keep
                if name != matrix and self.infos[matrix].dtype != kept:
                    continue
                if is_eight_bit(tensor.dtype) and tensor.dtype != kept:
                    scale_info = self.infos[name + SCALE]
                    ((_, scale),) = read_tensors(scale_info.file, [name + SCALE])
                    tensor = tensor.float() * scale.float()[:, None]
                floats = tensor.float() if is_eight_bit(tensor.dtype) else tensor
                if tensor.is_floating_point() and not torch.isfinite(floats).all():
                    raise CheckpointError(f"{file}: {name} holds NaN or infinity; the file is damaged, fetch it again")
                yield name, tensor

    def verify(self, vocab_size: int | None = None) -> None:
        """Read every weight file once, so that a damaged one is found before an engine starts.

        A file with a SHA-256 in config.json is compared with that (``save_speculators`` writes one and refuses values
        that are not finite).  Of others, a ``torch.save`` archive's CRCs are compared, and every value must be finite:
        a flipped bit in a safetensors file without a SHA-256 may go unseen.

        vocab_size: of the target; every entry of ``d2t`` must point into it.

        Raises: CheckpointError naming the file, and the tensor where it is known.
        """
        sums, unknown = checksums(self.config), False
        for file in sorted({info.file for info in self.infos.values()}):
            if file.name in sums:
                check_digest(file, sums[file.name])
                continue
            unknown = True
            if file.suffix != ".safetensors":
                check_archive(file)
        if unknown:
            for _ in self.tensors():
                pass
        if vocab_size is not None and D2T in self.infos:
            file = self.infos[D2T].file
            ((_, offsets),) = read_tensors(file, [D2T])
            target_ids(offsets, vocab_size, str(file))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint folder (or one weight file) and check that it is a whole drafter.

    Raises: CheckpointError naming the file or tensors that are missing, unknown, misshapen or unreadable.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    files, promised = weight_files(path)
    config = read_config(folder / "config.json")
    check_config(folder / "config.json", config or {})
    check_checksums(folder / "config.json", config or {})
    for file in (*(files if path.is_dir() else ()), folder / "config.json"):
        check_place(file, folder)
    infos: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in list_tensors(file).items():
            if name in infos:
                raise CheckpointError(f"{file}: tensor {name} is also in {infos[name].file.name}; keep one of the two")
            infos[name] = info
    if absent := sorted(promised - set(infos)):
        raise CheckpointError(f"{path}: tensors of its index are missing: {some(absent)}; fetch the checkpoint again")
    drafter = _drafter_by(config, infos) or DEFAULT
    sizes = drafter.read_sizes(path, infos, config)
    layout = "speculators" if config and TYPE_KEY in config else f"released ({files[0].suffix[1:]})"
    return Checkpoint(path, drafter, layout, config, infos, sizes)


def _drafter_by(config: dict[str, Any] | None, names: Collection[str]) -> Drafter | None:
    """The drafter that a config.json of the speculators layout names, else the one that has such tensors."""
    if config and config.get(TYPE_KEY):
        return DRAFTERS.get(str(config[TYPE_KEY]))
    return next((drafter for drafter in DRAFTERS.values() if drafter.has_tensors(names)), None)


def drafter_in(path: str | Path) -> Drafter | None:
    """The drafter that a local folder holds, sound or not: by its config, else by its tensor names."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    try:
        config = read_config(folder / "config.json")
        if config and config.get(TYPE_KEY):
            return _drafter_by(config, ())
        return _drafter_by(None, {name for file in weight_files(folder)[0] for name in list_tensors(file)})
    except (CheckpointError, OSError):
        return None


def save_speculators(
    folder: str | Path,
    tensors: dict[str, Tensor],
    verifier: str,
    layer_config: dict[str, Any],
    int8: bool = False,
    drafter: Drafter = DEFAULT,
    config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Write a checkpoint in the speculators layout; matrices as int8 with one scale a row when ``int8``.

    config: what no tensor tells, by the keys of the drafter's own config.json.

    The files appear under their names only when whole; config.json holds the SHA-256 of the weights.

    Raises: CheckpointError for tensors that are no drafter or not finite, and for a folder that cannot be written.
    """
    folder = Path(folder)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if name != EMBEDDING}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: {name} holds NaN or infinity; nothing is written")
    if int8:
        tensors = dict(item for name, tensor in tensors.items() for item in quantise(name, tensor))
    infos = {name: TensorInfo(tuple(t.shape), t.dtype, folder) for name, t in tensors.items()}
    sizes = drafter.read_sizes(folder, infos, config)
    write_checkpoint(folder, tensors, speculators_config(drafter, sizes, verifier, layer_config), checksum=True)
    return open_checkpoint(folder)


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], checksum: bool = False) -> None:
    """Both files of a checkpoint, or none.  checksum: config.json gets the SHA-256 of the weights.

    Raises: CheckpointError when they cannot be written.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The config takes its place last.
        with whole(folder / "config.json") as config_part, whole(folder / "model.safetensors") as weights:
            save_file(tensors, weights, metadata={"format": "pt"})
            weights.chmod(0o644)
            sums = {SHA256: {"model.safetensors": sha256_of(weights)}} if checksum else {}
            write_json(config_part, {**config, **sums})
    except (OSError, SafetensorError) as error:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise CheckpointError(
            f"{folder}: the checkpoint cannot be written ({error}); free space there or give another folder"
        ) from error
