"""Which tensors a Mixture of Attentions drafter has, and what their shapes say.

Names are the released ones.  Two inputs of the layer self-attention are told apart by the tensors: a norm
``state_norms.I`` for each target layer I whose input state it reads, or none where it reads every layer's keys and
values.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_gumiho.checkpoint.files import TensorInfo
from vllm_gumiho.checkpoint.tensors import D2T, EMBEDDING, Shape, check_tensors, most_common_size
from vllm_gumiho.errors import CheckpointError

SELF, CROSS, LAYERS, OUT = "self_attention", "cross_attention", "layer_self_attention", "Ekv2E"
STATE_NORM = re.compile(r"state_norms\.(\d+)\.weight")
# config.json: the layer self-attention, whose head count no tensor tells.
LAYER_KEY = "layer_attention"
# The most tokens of a chain, where the checkpoint does not say.
CHAIN = 7


@dataclass(frozen=True)
class LayerShape:
    """The layer self-attention, as ``layer_attention`` of config.json has it.

    target_layers: those whose input states it reads, ascending; none where it reads keys and values of all.
    """

    width: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    target_layers: tuple[int, ...] | list[int]


@dataclass(frozen=True)
class MoaSizes:
    """What the tensors say.  Rows of q and k projections are head counts times a head dimension.

    layer_*: of the layer self-attention.  target_layers: those whose input states it reads, ascending; none where it
    reads keys and values.  layer_heads, max_draft_tokens: from config.json; None is as many heads as the draft layers
    have.
    """

    hidden_size: int
    intermediate_size: int
    query_size: int
    key_size: int
    layer_width: int
    layer_intermediate_size: int
    layer_query_size: int
    layer_key_size: int
    target_layers: tuple[int, ...]
    vocab_size: int | None
    draft_vocab_size: int | None = None
    layer_heads: int | None = None
    max_draft_tokens: int = CHAIN

    @property
    def num_layers(self) -> int:
        """Of the draft: self-attention and cross-attention."""
        return 2

    def passes(self) -> str:
        """What drafts its K tokens, in words."""
        named = ", ".join(map(str, self.target_layers))
        read = f"states of target layers {named}" if named else "keys and values of all target layers"
        return f"up to {self.max_draft_tokens} serial tokens from {read}"

    def layer_shape(self, heads: int) -> LayerShape:
        """Of the layer self-attention, of ``heads`` heads where config.json does not tell."""
        heads = self.layer_heads or heads
        size = self.layer_query_size // heads
        width, inner = self.layer_width, self.layer_intermediate_size
        return LayerShape(width, inner, heads, self.layer_key_size // size, size, self.target_layers)


def layer_shapes(at: str, width: int, inner: int, query: int, key: int) -> dict[str, Shape]:
    """Names and shapes of one Llama layer's tensors."""
    return {
        f"{at}.self_attn.q_proj.weight": (query, width),
        f"{at}.self_attn.k_proj.weight": (key, width),
        f"{at}.self_attn.v_proj.weight": (key, width),
        f"{at}.self_attn.o_proj.weight": (width, query),
        f"{at}.mlp.gate_proj.weight": (inner, width),
        f"{at}.mlp.up_proj.weight": (inner, width),
        f"{at}.mlp.down_proj.weight": (width, inner),
        f"{at}.input_layernorm.weight": (width,),
        f"{at}.post_attention_layernorm.weight": (width,),
    }


def tensor_shapes(sizes: MoaSizes) -> dict[str, Shape]:
    """Names and shapes of all tensors of a drafter of these sizes."""
    draft = (sizes.hidden_size, sizes.intermediate_size, sizes.query_size, sizes.key_size)
    width = sizes.layer_width
    layers = (width, sizes.layer_intermediate_size, sizes.layer_query_size, sizes.layer_key_size)
    return {
        **layer_shapes(SELF, *draft),
        **layer_shapes(CROSS, *draft),
        **layer_shapes(LAYERS, *layers),
        f"{OUT}.weight": (sizes.hidden_size, width),
        f"{OUT}.bias": (sizes.hidden_size,),
        **{f"state_norms.{layer}.weight": (width,) for layer in sizes.target_layers},
    }


def has_tensors(names: Collection[str]) -> bool:
    """By the way from the layers to the draft, or any tensor of the two attentions that no other drafter has."""
    return any(name.startswith((f"{OUT}.", f"{CROSS}.", f"{LAYERS}.")) for name in names)


def read_sizes(where: Path, infos: Mapping[str, TensorInfo], config: Mapping[str, Any] | None) -> MoaSizes:
    """Sizes of the drafter, after checking that the tensors are exactly those of one.  Raises: CheckpointError."""
    config = config or {}
    inference = config.get("target_layer_inference")
    if inference:
        raise CheckpointError(
            f"{where}: target_layer_inference={inference!r}: drafting with copies of the target's last layers is not "
            "built; use a checkpoint without (target_layer_inference 0)"
        )

    def size(at: str, *places: tuple[str, int]) -> int:
        return most_common_size(dict(infos), ((f"{at}.{name}.weight", axis) for name, axis in places))

    def layer(at: str) -> tuple[int, int, int, int]:
        width = size(at, ("self_attn.q_proj", 1), ("self_attn.o_proj", 0), ("input_layernorm", 0))
        inner = size(at, ("mlp.gate_proj", 0), ("mlp.up_proj", 0), ("mlp.down_proj", 1))
        query = size(at, ("self_attn.q_proj", 0), ("self_attn.o_proj", 1))
        return width, inner, query, size(at, ("self_attn.k_proj", 0), ("self_attn.v_proj", 0))

    hidden, inner, query, key = layer(SELF)
    width, layer_inner, layer_query, layer_key = layer(LAYERS)
    target_layers = tuple(sorted({int(match[1]) for match in map(STATE_NORM.fullmatch, infos) if match}))
    vocabulary, draft_vocabulary = infos.get(EMBEDDING), infos.get(D2T)
    sizes = MoaSizes(
        hidden_size=hidden,
        intermediate_size=inner,
        query_size=query,
        key_size=key,
        layer_width=hidden if target_layers else width,
        layer_intermediate_size=layer_inner,
        layer_query_size=layer_query,
        layer_key_size=layer_key,
        target_layers=target_layers,
        vocab_size=vocabulary.shape[0] if vocabulary and vocabulary.shape else None,
        draft_vocab_size=draft_vocabulary.shape[0] if draft_vocabulary and draft_vocabulary.shape else None,
        layer_heads=_layer_heads(where, config, layer_query, layer_key),
        max_draft_tokens=_chain(where, config),
    )
    wanted = tensor_shapes(sizes)
    wanted |= {EMBEDDING: (None, hidden)} if vocabulary else {}
    wanted |= {D2T: (None,)} if draft_vocabulary else {}
    check_tensors(
        where, dict(infos), wanted, "MoA", f"hidden size {hidden}, layer attention of width {sizes.layer_width}"
    )
    return sizes


def _layer_heads(where: Path, config: Mapping[str, Any], query: int, key: int) -> int | None:
    layer = config.get(LAYER_KEY)
    heads = layer.get("num_heads") if isinstance(layer, dict) else None
    if layer is None:
        return None
    if type(heads) is not int or heads < 1 or query % heads or key % (query // heads):
        raise CheckpointError(
            f"{where}: {LAYER_KEY} of config.json is {layer!r}; expected num_heads that divides the {query} rows of "
            f"{LAYERS}.self_attn.q_proj, each head as wide as one of the {key} rows of k_proj; fetch the checkpoint "
            "again"
        )
    return heads


def _chain(where: Path, config: Mapping[str, Any]) -> int:
    """The most tokens of a draft: the first proposal that config.json has of the speculators format."""
    speculators = config.get("speculators_config")
    methods = speculators.get("proposal_methods") if isinstance(speculators, dict) else None
    if not methods:
        return CHAIN
    first = methods[0] if isinstance(methods, list) else None
    tokens = first.get("speculative_tokens") if isinstance(first, dict) else None
    if type(tokens) is not int or tokens < 1:
        raise CheckpointError(
            f"{where}: proposal_methods of config.json is {methods!r}; expected speculative_tokens, a whole number "
            "above 0; fetch the checkpoint again"
        )
    return tokens
