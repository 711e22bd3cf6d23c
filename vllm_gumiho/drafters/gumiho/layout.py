"""Which tensors a Gumiho drafter has, and what their shapes say.

A drafter whose first serial step reads several of the target's layers has a norm ``state_norms.I`` for each layer I,
and ``combine``, which makes a feature of the normalised states side by side; all else is the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vllm_gumiho.checkpoint.files import TensorInfo
from vllm_gumiho.checkpoint.tensors import D2T, EMBEDDING, Shape, check_tensors, most_common_size
from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.kernels.parallel_heads.reference import HEAD_STAGES

LAYER = re.compile(
    r"layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj|input_layernorm|post_attention_layernorm)\.weight"
)
STAGE = re.compile(r"mlp\.(\d+)\.(\d+)\.linear\.(weight|bias)")
STATE_NORM = re.compile(r"state_norms\.(\d+)\.weight")
COMBINE = "combine"


@dataclass(frozen=True)
class GumihoSizes:
    """What the tensors say.  Rows of q/k projections are head counts times the head dimension.

    draft_vocab_size: entries of ``d2t`` (target id minus draft id), for drafters of a reduced vocabulary.
    target_layers: those whose states the first serial step reads, ascending; none where it reads the last feature.
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
    target_layers: tuple[int, ...] = ()

    @property
    def max_draft_tokens(self) -> int:
        """K of a full draft: serial steps and heads."""
        return self.num_serial_steps + self.num_heads

    def passes(self) -> str:
        """What drafts its K tokens, in words."""
        drafted = f"{self.num_serial_steps} serial tokens and {self.num_heads} from heads"
        named = ", ".join(map(str, self.target_layers))
        return f"{drafted}, from states of target layers {named}" if named else drafted


def tensor_shapes(sizes: GumihoSizes) -> dict[str, Shape]:
    """Names and shapes of all tensors of a drafter of these sizes, as released checkpoints have them."""
    hidden, query, key, inner = sizes.hidden_size, sizes.query_size, sizes.key_size, sizes.intermediate_size
    shapes: dict[str, Shape] = {"fc.weight": (hidden, 2 * hidden)}
    if sizes.fc_bias:
        shapes["fc.bias"] = (hidden,)
    if sizes.target_layers:
        shapes |= {f"state_norms.{layer}.weight": (hidden,) for layer in sizes.target_layers}
        shapes |= {f"{COMBINE}.weight": (hidden, len(sizes.target_layers) * hidden), f"{COMBINE}.bias": (hidden,)}
    for i in range(sizes.num_layers):
        at = f"layers.{i}."
        shapes |= {
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
            shapes[f"{at}input_layernorm.weight"] = (hidden,)
    for head in range(sizes.num_heads):
        for stage in range(HEAD_STAGES):
            width = hidden if stage else sizes.num_serial_steps * hidden
            shapes[f"mlp.{head}.{stage}.linear.weight"] = (hidden, width)
            shapes[f"mlp.{head}.{stage}.linear.bias"] = (hidden,)
    return shapes


def read_sizes(where: Path, infos: dict[str, TensorInfo]) -> GumihoSizes:
    """Sizes of the drafter, after checking that the tensors are exactly those of one.  Raises: CheckpointError."""
    layers = len({int(m[1]) for m in map(LAYER.fullmatch, infos) if m})
    heads = len({int(m[1]) for m in map(STAGE.fullmatch, infos) if m})
    fc = infos.get("fc.weight")
    if fc is None or layers == 0 or heads == 0:
        lacking = [n for n, ok in (("fc.weight", fc), ("layers.*", layers), ("mlp.*.*.linear.*", heads)) if not ok]
        raise CheckpointError(f"{where}: not a Gumiho checkpoint, it has no {' and no '.join(lacking)}")

    def layer_size(*places: tuple[str, int]) -> int:
        named = ((f"layers.{i}.{name}.weight", axis) for i in range(layers) for name, axis in places)
        return most_common_size(infos, named)

    biases = ((f"mlp.{head}.{stage}.linear.bias", 0) for head in range(heads) for stage in range(HEAD_STAGES))
    hidden = most_common_size(infos, (("fc.weight", 0), *biases))
    if hidden == 0:
        raise CheckpointError(f"{where}: fc.weight has shape {list(fc.shape)}, expected [hidden size, 2 * hidden size]")
    first_stages = ((f"mlp.{head}.0.linear.weight", 1) for head in range(heads))
    vocabulary, draft_vocabulary = infos.get(EMBEDDING), infos.get(D2T)
    sizes = GumihoSizes(
        hidden_size=hidden,
        intermediate_size=layer_size(("mlp.gate_proj", 0), ("mlp.up_proj", 0), ("mlp.down_proj", 1)),
        query_size=layer_size(("self_attn.q_proj", 0), ("self_attn.o_proj", 1)),
        key_size=layer_size(("self_attn.k_proj", 0), ("self_attn.v_proj", 0)),
        num_layers=layers,
        num_serial_steps=max(1, most_common_size(infos, first_stages) // hidden),
        num_heads=heads,
        fc_bias="fc.bias" in infos,
        vocab_size=vocabulary.shape[0] if vocabulary and vocabulary.shape else None,
        draft_vocab_size=draft_vocabulary.shape[0] if draft_vocabulary and draft_vocabulary.shape else None,
        target_layers=tuple(sorted({int(match[1]) for match in map(STATE_NORM.fullmatch, infos) if match})),
    )
    wanted = tensor_shapes(sizes)
    wanted |= {EMBEDDING: (None, hidden)} if vocabulary else {}
    wanted |= {D2T: (None,)} if draft_vocabulary else {}
    check_tensors(where, infos, wanted, "Gumiho", f"hidden size {hidden}")
    return sizes
