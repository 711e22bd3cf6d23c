"""What a target's config says, under whichever of its names, that draft layers are made from.

Draft layers are Llama's: one rotary embedding of the whole head, RMS norms, an MLP.
"""

from __future__ import annotations

from typing import Any

# The base of a rope that names none.
THETA = 10000.0
# Rope types that are of other layers than Llama's; their base alone is taken.
_OTHER_ROPES = ("mrope", "bailing_mrope", "mllama4", "proportional")
# Keys of a rope that hold for the target's layers alone: rows, columns and frames of images, a part of the head.
_OF_TARGET = ("mrope_section", "mrope_interleaved", "partial_rotary_factor")


def rope_of(config: Any) -> dict[str, Any]:
    """Rope parameters for draft layers: the target's, those of its full attention where kinds of layers have their own.

    config: the target's Hugging Face text config.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    nested = {kind: each for kind, each in rope.items() if isinstance(each, dict)}
    if nested:
        rope = nested.get("full_attention") or next(iter(nested.values()))
    found = {key: value for key, value in rope.items() if key not in _OF_TARGET}
    if found.get("rope_type", "default") in _OTHER_ROPES:
        found = {key: value for key, value in found.items() if key == "rope_theta"}
    found.setdefault("rope_type", found.pop("type", "default"))
    base = getattr(config, "rope_theta", None) or (None if rope else THETA)
    if found.get("rope_theta") is None and base is not None:
        found["rope_theta"] = float(base)
    return found


def norm_eps_of(config: Any) -> float:
    """Of the target's norms, 1e-6 where it names none."""
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps", "layernorm_epsilon")
    return float(_first(config, *names) or 1e-6)


def intermediate_size_of(config: Any) -> int:
    """Width of the target's MLPs, four times the hidden size where it names none."""
    return int(_first(config, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size") or 4 * config.hidden_size)


def head_dim_of(config: Any) -> int:
    """Width of the target's attention heads."""
    return int(_first(config, "head_dim") or config.hidden_size // config.num_attention_heads)


def kv_heads_of(config: Any) -> int:
    """Key heads of the target's attention."""
    return int(_first(config, "num_key_value_heads", "num_kv_heads") or config.num_attention_heads)


def _first(config: Any, *names: str) -> Any:
    """The first of these that the config has, None where it has none."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
