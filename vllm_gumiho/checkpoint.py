"""Every Gumiho checkpoint format, read and written here and nowhere else.

Formats: the released layout (``pytorch_model.bin`` or safetensors, sharded or not, with or without config.json)
and the speculators layout (safetensors and a config.json with ``speculators_model_type: "gumiho"``).  Tensor names
are the released ones in both.  A weight may be int8 with a ``<name>_scale`` of one value a row; it is widened when
read.  Numbers of heads, serial steps and layers come from the tensors, never from a config.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

HEAD_STAGES = 6
SPECULATORS_TYPE = "gumiho"
ARCHITECTURE = "EagleGumihoForCausalLM"

_SCALE = "_scale"
_COPIED_KEYS = (
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta", "rope_scaling",
    "vocab_size",
)  # fmt: skip
_LAYER = re.compile(
    r"layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj|input_layernorm|post_attention_layernorm)\.weight"
)
_STAGE = re.compile(r"mlp\.(\d+)\.(\d+)\.linear\.(weight|bias)")
_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "F64": torch.float64,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used.  The message names the file or tensor, the reason and the remedy."""


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


@dataclass(frozen=True)
class DrafterSizes:
    """What the tensors say.  Rows of q/k projections are head counts times the head dimension."""

    hidden_size: int
    intermediate_size: int
    query_size: int
    key_size: int
    num_layers: int
    num_serial_steps: int
    num_heads: int
    fc_bias: bool
    vocab_size: int | None

    @property
    def max_draft_tokens(self) -> int:
        """K of a full draft: serial steps and heads."""
        return self.num_serial_steps + self.num_heads


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: names and shapes are known, no weight is in memory.  Made by `open_checkpoint`."""

    path: Path
    layout: str
    config: dict[str, Any] | None
    infos: dict[str, TensorInfo]
    sizes: DrafterSizes

    @property
    def verifier(self) -> str | None:
        """Name or path of the target the checkpoint says it was trained for."""
        verifier = ((self.config or {}).get("speculators_config") or {}).get("verifier") or {}
        return verifier.get("name_or_path")

    @property
    def layer_config(self) -> dict[str, Any]:
        """Llama config of the draft layers, as far as the checkpoint has one."""
        config = self.config or {}
        if "speculators_model_type" in config:
            config = config.get("transformer_layer_config") or {}
        return {key: value for key, value in config.items() if value is not None}

    def tensors(self, keep_int8: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, tensor)`` one at a time, int8 weights widened to float32 unless ``keep_int8``.

        The target's embedding, which released checkpoints carry a copy of, is left out.

        Raises: CheckpointError for a tensor that cannot be read or holds values that are not finite.
        """
        for file in sorted({info.file for info in self.infos.values()}):
            names = [name for name, info in self.infos.items() if info.file == file and name != "embed_tokens.weight"]
            for name, tensor in _read(file, names):
                if not keep_int8 and name.endswith(_SCALE):
                    continue
                if tensor.dtype == torch.int8 and not keep_int8:
                    scale_info = self.infos[name + _SCALE]
                    ((_, scale),) = _read(scale_info.file, [name + _SCALE])
                    tensor = tensor.float() * scale.float()[:, None]
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise CheckpointError(f"{file}: {name} holds NaN or infinity; the file is damaged, fetch it again")
                yield name, tensor


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint folder (or one weight file) and check that it is a whole Gumiho drafter.

    Raises: CheckpointError naming the file or tensors that are missing, unknown, misshapen or unreadable.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    files, promised = _weight_files(path)
    config = _read_config(folder / "config.json")
    _check_config(folder / "config.json", config or {})
    infos: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in _list(file).items():
            if name in infos:
                raise CheckpointError(f"{file}: tensor {name} is also in {infos[name].file.name}; keep one of the two")
            infos[name] = info
    if absent := sorted(promised - set(infos)):
        raise CheckpointError(f"{path}: tensors of its index are missing: {_some(absent)}; fetch the checkpoint again")
    sizes = _check_tensors(path, infos)
    layout = "speculators" if config and "speculators_model_type" in config else f"released ({files[0].suffix[1:]})"
    return Checkpoint(path, layout, config, infos, sizes)


def looks_like_gumiho(path: str | Path) -> bool:
    """Whether a local folder holds a Gumiho drafter, sound or not: by its config, else by its tensor names."""
    folder = Path(path)
    if not folder.is_dir():
        return False
    try:
        config = _read_config(folder / "config.json")
        if config and config.get("speculators_model_type"):
            return config["speculators_model_type"] == SPECULATORS_TYPE
        names = {name for file in _weight_files(folder)[0] for name in _list(file)}
    except (CheckpointError, OSError):
        return False
    return "fc.weight" in names and any(_STAGE.fullmatch(name) for name in names)


def speculators_config(sizes: DrafterSizes, verifier: str, layer_config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the speculators layout.  layer_config: Llama config of the draft layers, head counts in it.

    Raises: CheckpointError for values of a wrong kind, or head counts or hidden size that contradict the tensors.
    """
    layer = {key: value for key, value in layer_config.items() if value is not None}
    _check_layer(layer)
    heads, kv_heads = layer.get("num_attention_heads"), layer.get("num_key_value_heads")
    if not heads or sizes.query_size % heads:
        raise CheckpointError(
            f"num_attention_heads={heads} does not divide the {sizes.query_size} rows of q_proj; "
            "name the target with --target so that its head dimension is used"
        )
    head_dim = sizes.query_size // heads
    kv_heads = kv_heads or sizes.key_size // head_dim
    if kv_heads * head_dim != sizes.key_size:
        raise CheckpointError(
            f"num_key_value_heads={kv_heads} times head_dim={head_dim} is not the {sizes.key_size} rows of k_proj"
        )
    if layer.get("hidden_size", sizes.hidden_size) != sizes.hidden_size:
        raise CheckpointError(f"config.json says hidden_size={layer['hidden_size']}, fc.weight {sizes.hidden_size}")
    layer = {key: layer[key] for key in _COPIED_KEYS if key in layer}
    layer |= {
        "model_type": "llama",
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": sizes.num_layers,
    }
    if sizes.vocab_size:
        layer.setdefault("vocab_size", sizes.vocab_size)
    return {
        "speculators_model_type": SPECULATORS_TYPE,
        "architectures": [ARCHITECTURE],
        "num_serial_steps": sizes.num_serial_steps,
        "num_parallel_heads": sizes.num_heads,
        "fc_bias": sizes.fc_bias,
        "speculators_config": {
            "algorithm": SPECULATORS_TYPE,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": sizes.max_draft_tokens}],
            "verifier": {"name_or_path": verifier, "architectures": []},
        },
        "transformer_layer_config": layer,
    }


def save_speculators(
    folder: str | Path, tensors: dict[str, Tensor], verifier: str, layer_config: dict[str, Any], int8: bool = False
) -> Checkpoint:
    """Write a checkpoint in the speculators layout; matrices as int8 with one scale a row when ``int8``.

    The files appear under their names only when whole.  Raises: CheckpointError for tensors that are no drafter.
    """
    folder = Path(folder)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if name != "embed_tokens.weight"}
    if int8:
        tensors = dict(item for name, tensor in tensors.items() for item in _quantise(name, tensor))
    infos = {name: TensorInfo(tuple(t.shape), t.dtype, folder) for name, t in tensors.items()}
    config = speculators_config(_check_tensors(folder, infos), verifier, layer_config)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    save_file(tensors, weights.with_suffix(".part"), metadata={"format": "pt"})
    weights.with_suffix(".part").chmod(0o644)
    weights.with_suffix(".part").replace(weights)
    write_json(folder / "config.json", config)
    return open_checkpoint(folder)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that a reader sees all of it or none."""
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _quantise(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if tensor.ndim != 2:
        yield name, tensor.to(torch.bfloat16)
        return
    scale = tensor.float().abs().amax(dim=1).clamp_min(1e-12) / 127
    yield name, (tensor.float() / scale[:, None]).round().to(torch.int8)
    yield name + _SCALE, scale


def _weight_files(path: Path) -> tuple[list[Path], set[str]]:
    """Files that hold the tensors, and the tensor names that an index of them promises."""
    if path.is_file():
        return [path], set()
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder; give a Gumiho checkpoint or a hub name")
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
    raise CheckpointError(f"{path}: no *.safetensors and no pytorch_model*.bin in it; is it a Gumiho checkpoint?")


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name to file name in the index's own folder.  (The files may be links, as in the hub's cache.)"""
    places = (_read_config(index) or {}).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: has no weight_map; fetch it again, or remove it if there is only one file")
    outside = [shard for shard in places.values() if not isinstance(shard, str) or Path(shard).name != shard]
    if outside:
        raise CheckpointError(f"{index}: weight_map names {outside[0]!r}, which is no file of the same folder")
    missing = sorted({shard for shard in places.values() if not (index.parent / shard).is_file()})
    if missing:
        raise CheckpointError(f"{index}: shards are missing: {_some(missing)}; fetch the checkpoint again")
    return places


def _read_config(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); fetch it again or remove it") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {type(content).__name__}, not an object; fetch it again or remove it")
    return content


def _check_config(file: Path, config: dict[str, Any]) -> None:
    """Refuse a config.json whose speculators part has another shape than the format's."""
    kind = config.get("speculators_model_type", SPECULATORS_TYPE)
    if kind != SPECULATORS_TYPE:
        raise CheckpointError(f"{file}: speculators_model_type is {kind!r}, not {SPECULATORS_TYPE!r}")
    speculators = config.get("speculators_config") or {}
    verifier = (speculators.get("verifier") or {}) if isinstance(speculators, dict) else {}
    for key, value in (
        ("transformer_layer_config", config.get("transformer_layer_config") or {}),
        ("speculators_config", speculators),
        ("speculators_config.verifier", verifier),
    ):
        if not isinstance(value, dict):
            raise CheckpointError(f"{file}: {key} is {value!r}, expected an object; convert the checkpoint again")
    name = verifier.get("name_or_path")
    if name is not None and not isinstance(name, str):
        raise CheckpointError(f"{file}: speculators_config.verifier.name_or_path is {name!r}, expected a name or path")


def _check_layer(layer: dict[str, Any]) -> None:
    """Refuse values of a draft layer config that are of a wrong kind.  An absent key is no concern here."""

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf

    def count(value: Any) -> bool:
        return isinstance(value, int) and number(value)

    counts = ("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "vocab_size")
    expected: list[tuple[str, str, bool]] = [
        *((key, "a whole number above 0", count(layer.get(key, 1))) for key in counts),
        *((key, "a number above 0", number(layer.get(key, 1))) for key in ("rms_norm_eps", "rope_theta")),
        *((key, "an object", isinstance(layer.get(key, {}), dict)) for key in ("rope_parameters", "rope_scaling")),
        ("hidden_act", "'silu', as draft layers are Llama's", layer.get("hidden_act", "silu") == "silu"),
    ]
    for key, kind, fits in expected:
        if not fits:
            raise CheckpointError(f"config of the draft layers: {key} is {layer[key]!r}, expected {kind}")


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


def _list(file: Path) -> dict[str, TensorInfo]:
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


def _read(file: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
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


def _check_tensors(where: Path, infos: dict[str, TensorInfo]) -> DrafterSizes:
    """Sizes of the drafter, after checking that the tensors are exactly those of one."""
    layers = len({int(m[1]) for m in map(_LAYER.fullmatch, infos) if m})
    heads = len({int(m[1]) for m in map(_STAGE.fullmatch, infos) if m})
    fc = infos.get("fc.weight")
    if fc is None or layers == 0 or heads == 0:
        lacking = [n for n, ok in (("fc.weight", fc), ("layers.*", layers), ("mlp.*.*.linear.*", heads)) if not ok]
        raise CheckpointError(f"{where}: not a Gumiho checkpoint, it has no {' and no '.join(lacking)}")

    def most(places: Iterable[tuple[str, int]]) -> int:
        """The size that most of these (tensor, axis) have, so that one odd tensor is the one named."""
        shapes = ((infos[name].shape, axis) for name, axis in places if name in infos)
        sizes = Counter(shape[axis] for shape, axis in shapes if len(shape) > axis)
        return sizes.most_common(1)[0][0] if sizes else 0

    def layer_size(*places: tuple[str, int]) -> int:
        return most((f"layers.{i}.{name}.weight", axis) for i in range(layers) for name, axis in places)

    biases = ((f"mlp.{head}.{stage}.linear.bias", 0) for head in range(heads) for stage in range(HEAD_STAGES))
    hidden = most((("fc.weight", 0), *biases))
    if hidden == 0:
        raise CheckpointError(f"{where}: fc.weight has shape {list(fc.shape)}, expected [hidden size, 2 * hidden size]")
    query = layer_size(("self_attn.q_proj", 0), ("self_attn.o_proj", 1))
    key = layer_size(("self_attn.k_proj", 0), ("self_attn.v_proj", 0))
    inner = layer_size(("mlp.gate_proj", 0), ("mlp.up_proj", 0), ("mlp.down_proj", 1))
    serial = max(1, most((f"mlp.{head}.0.linear.weight", 1) for head in range(heads)) // hidden)
    wanted: dict[str, tuple[int | None, ...]] = {"fc.weight": (hidden, 2 * hidden)}
    fc_bias = "fc.bias" in infos
    if fc_bias:
        wanted["fc.bias"] = (hidden,)
    for i in range(layers):
        at = f"layers.{i}."
        wanted |= {
            f"{at}self_attn.q_proj.weight": (query, hidden),
            f"{at}self_attn.k_proj.weight": (key, hidden),
            f"{at}self_attn.v_proj.weight": (key, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, query),
            f"{at}mlp.gate_proj.weight": (inner, hidden),
            f"{at}mlp.up_proj.weight": (inner, hidden),
            f"{at}mlp.down_proj.weight": (hidden, inner),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }
        if i > 0:
            wanted[f"{at}input_layernorm.weight"] = (hidden,)
    for head in range(heads):
        for stage in range(HEAD_STAGES):
            width = serial * hidden if stage == 0 else hidden
            wanted[f"mlp.{head}.{stage}.linear.weight"] = (hidden, width)
            wanted[f"mlp.{head}.{stage}.linear.bias"] = (hidden,)
    vocab = infos.get("embed_tokens.weight")
    if vocab is not None:
        wanted["embed_tokens.weight"] = (None, hidden)

    missing = sorted(set(wanted) - set(infos))
    if missing:
        raise CheckpointError(f"{where}: tensors are missing: {_some(missing)}; fetch the checkpoint again")
    scales = {name + _SCALE for name, info in infos.items() if info.dtype == torch.int8}
    unknown = sorted(set(infos) - set(wanted) - scales)
    if unknown:
        raise CheckpointError(f"{where}: no Gumiho drafter has tensors {_some(unknown)}; nothing is dropped silently")
    for name in sorted(wanted):
        expected, info = wanted[name], infos[name]
        fits = len(info.shape) == len(expected) and all(
            e in (None, size) for e, size in zip(expected, info.shape, strict=True)
        )
        if not fits or 0 in info.shape:
            shown = ", ".join("any" if e is None else str(e) for e in expected)
            raise CheckpointError(
                f"{where}: {name} has shape {list(info.shape)}, expected [{shown}] (hidden size {hidden})"
            )
        if info.dtype == torch.int8:
            scale = infos.get(name + _SCALE)
            if len(info.shape) != 2 or scale is None or scale.shape != info.shape[:1] or scale.dtype not in _FLOATS:
                raise CheckpointError(
                    f"{where}: {name} is int8 and needs a floating-point {name}{_SCALE} of shape [{info.shape[0]}]"
                )
        elif info.dtype not in _FLOATS:
            raise CheckpointError(
                f"{where}: {name} is {info.dtype}; expected float32, float16, bfloat16, float64, or int8 with a scale"
            )
    return DrafterSizes(
        hidden_size=hidden, intermediate_size=inner, query_size=query, key_size=key, num_layers=layers,
        num_serial_steps=serial, num_heads=heads, fc_bias=fc_bias, vocab_size=vocab.shape[0] if vocab else None,
    )  # fmt: skip


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
