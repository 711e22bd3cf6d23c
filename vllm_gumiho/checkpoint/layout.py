"""Which tensors a Gumiho drafter has, and what their shapes say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_gumiho.checkpoint.files import CheckpointError, TensorInfo, some

HEAD_STAGES = 6
SCALE = "_scale"
D2T = "d2t"
LAYER = re.compile(
    r"layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj|input_layernorm|post_attention_layernorm)\.weight"
)
STAGE = re.compile(r"mlp\.(\d+)\.(\d+)\.linear\.(weight|bias)")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class DrafterSizes:
    """What the tensors say.  Rows of q/k projections are head counts times the head dimension.

    draft_vocab_size: entries of ``d2t`` (target id minus draft id), for drafters of a reduced vocabulary.
    """

    hidden_size: int
    intermediate_size: int
    query_size: int
    key_size: int
    num_layers: int
    num_serial_steps: int
    num_heads: int
    fc_bias: bool
    vocab_size: int | None
    draft_vocab_size: int | None = None

    @property
    def max_draft_tokens(self) -> int:
        """K of a full draft: serial steps and heads."""
        return self.num_serial_steps + self.num_heads


def check_tensors(where: Path, infos: dict[str, TensorInfo]) -> DrafterSizes:
    """Sizes of the drafter, after checking that the tensors are exactly those of one."""
    layers = len({int(m[1]) for m in map(LAYER.fullmatch, infos) if m})
    heads = len({int(m[1]) for m in map(STAGE.fullmatch, infos) if m})
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
    if D2T in infos:
        wanted[D2T] = (None,)

    missing = sorted(set(wanted) - set(infos))
    if missing:
        raise CheckpointError(f"{where}: tensors are missing: {some(missing)}; fetch the checkpoint again")
    scales = {name + SCALE for name, info in infos.items() if info.dtype == torch.int8}
    unknown = sorted(set(infos) - set(wanted) - scales)
    if unknown:
        raise CheckpointError(f"{where}: no Gumiho drafter has tensors {some(unknown)}; nothing is dropped silently")
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
        if name == D2T:
            if info.dtype not in (torch.int64, torch.int32):
                raise CheckpointError(f"{where}: {D2T} is {info.dtype}; expected int64 offsets to target token ids")
        elif info.dtype == torch.int8:
            scale = infos.get(name + SCALE)
            if len(info.shape) != 2 or scale is None or scale.shape != info.shape[:1] or scale.dtype not in _FLOATS:
                raise CheckpointError(
                    f"{where}: {name} is int8 and needs a floating-point {name}{SCALE} of shape [{info.shape[0]}]"
                )
        elif info.dtype not in _FLOATS:
            raise CheckpointError(
                f"{where}: {name} is {info.dtype}; expected float32, float16, bfloat16, float64, or int8 with a scale"
            )
    return DrafterSizes(
        hidden_size=hidden, intermediate_size=inner, query_size=query, key_size=key, num_layers=layers,
        num_serial_steps=serial, num_heads=heads, fc_bias=fc_bias, vocab_size=vocab.shape[0] if vocab else None,
        draft_vocab_size=infos[D2T].shape[0] if D2T in infos else None,
    )  # fmt: skip
