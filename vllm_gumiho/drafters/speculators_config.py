"""config.json of the speculators layout, for every drafter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from vllm_gumiho.drafters import DRAFTERS, PER_REQUEST, SEEDED_TEXT, Drafter, Sizes
from vllm_gumiho.errors import CheckpointError

TYPE_KEY = "speculators_model_type"
# How a draft model is to keep its weights and the LM head, of `drafters.draft_weights`.
WEIGHT_KEYS = ("gumiho_draft_weights", "gumiho_draft_lm_head")
_COPIED_KEYS = (
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta", "rope_scaling",
    "vocab_size",
)  # fmt: skip
_ROPE_KEYS = {"rope_parameters", "rope_scaling"}
# Rope types that vLLM 0.32 knows, and what each must give; its rotary embedding reads these without asking.
_YARN = ("factor", "original_max_position_embeddings")
_ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",), "ntk": ("factor",), "dynamic": ("factor",), "yarn": _YARN,
    "llama3": (*_YARN, "low_freq_factor", "high_freq_factor"), "deepseek_yarn": _YARN, "deepseek_llama_scaling": _YARN,
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"), "proportional": (), "mllama4": (),
    "bailing_mrope": ("mrope_section",), "openpangu": (), "mrope": (), "su": (),
}  # fmt: skip
_ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# vLLM's rotary embedding keeps a row for every position.
_MOST_POSITIONS = 2**24


def speculators_config(drafter: Drafter, sizes: Sizes, verifier: str, layer_config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the speculators layout.  layer_config: Llama config of the draft layers, head counts in it.

    Raises: CheckpointError for values of a wrong kind, or head counts or hidden size that contradict the tensors.
    """
    layer = {key: value for key, value in layer_config.items() if value is not None}
    _check_layer(layer)
    for key in _ROPE_KEYS & layer.keys():
        layer[key] = {name: value for name, value in layer[key].items() if value is not None}
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
        raise CheckpointError(f"config.json says hidden_size={layer['hidden_size']}, the tensors {sizes.hidden_size}")
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
        TYPE_KEY: drafter.name,
        "architectures": [drafter.architecture],
        **drafter.config_fields(sizes, heads),
        **({"draft_vocab_size": sizes.draft_vocab_size} if sizes.draft_vocab_size else {}),
        "speculators_config": {
            "algorithm": drafter.name,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": sizes.max_draft_tokens}],
            # A folder's whole path: an engine may be started from another one.
            "verifier": {
                "name_or_path": str(Path(verifier).resolve()) if Path(verifier).is_dir() else verifier,
                "architectures": [],
            },
        },
        "transformer_layer_config": layer,
    }


def check_verifier(path: str) -> None:
    """Refuse a checkpoint of ours, served by itself, whose target is a folder that is not there.

    path: a model as vLLM is given it; what is no folder of a drafter of ours passes.  Raises: CheckpointError.
    """
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValueError):
        return
    if not isinstance(config, dict) or config.get(TYPE_KEY) not in DRAFTERS:
        return
    check_config(file, config)
    name = ((config.get("speculators_config") or {}).get("verifier") or {}).get("name_or_path")
    if not name or Path(name).exists() or (name.count("/") == 1 and not name.startswith(("/", ".", "~"))):
        return
    raise CheckpointError(
        f"{path}: a drafter whose target is {name!r}, no folder here and no hub name; serve the target itself, with "
        f'"model": {path!r} in the speculative config, or convert the checkpoint with --target'
    )


def update_draft_config(drafter: Drafter, config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
    """vLLM's hook for a type of speculators, its names: fields of our config.json onto the draft's Llama config.

    Raises: CheckpointError for a field that is not there.
    """
    for key in drafter.config_keys:
        if key not in config_dict:
            raise CheckpointError(f"config.json of a {drafter.name} checkpoint has no {key}; convert it again")
        pre_trained_config[key] = config_dict[key]
    pre_trained_config["architectures"] = [drafter.architecture]
    pre_trained_config["gumiho_checkpoint"] = config_dict.get("gumiho_checkpoint")
    kept = (PER_REQUEST, SEEDED_TEXT, *WEIGHT_KEYS)
    pre_trained_config.update({key: config_dict[key] for key in kept if key in config_dict})


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Refuse a config.json whose speculators part has another shape than the format's."""
    kind = config.get(TYPE_KEY)
    if TYPE_KEY in config and (not isinstance(kind, str) or kind not in DRAFTERS):
        raise CheckpointError(f"{file}: {TYPE_KEY} is {kind!r}, not {' or '.join(map(repr, DRAFTERS))}")
    layer = config.get("transformer_layer_config")
    if (TYPE_KEY in config) != bool(layer):
        lacking = "transformer_layer_config" if TYPE_KEY in config else TYPE_KEY
        raise CheckpointError(f"{file}: has no {lacking}; fetch it again, or convert the checkpoint again")
    speculators = config.get("speculators_config") or {}
    verifier = (speculators.get("verifier") or {}) if isinstance(speculators, dict) else {}
    for key, value in (
        ("transformer_layer_config", layer or {}),
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

    counts = ("num_attention_heads", "num_key_value_heads", "vocab_size")
    positions = layer.get("max_position_embeddings", 1)
    expected: list[tuple[str, str, bool]] = [
        *((key, "a whole number above 0", count(layer.get(key, 1))) for key in counts),
        (
            "max_position_embeddings",
            f"a whole number from 1 to {_MOST_POSITIONS:,}",
            count(positions) and positions <= _MOST_POSITIONS,
        ),
        *((key, "a number above 0", number(layer.get(key, 1))) for key in ("rms_norm_eps", "rope_theta")),
        *((key, "an object", isinstance(layer.get(key, {}), dict)) for key in sorted(_ROPE_KEYS)),
        ("hidden_act", "'silu', as draft layers are Llama's", layer.get("hidden_act", "silu") == "silu"),
    ]
    for key, kind, fits in expected:
        if not fits:
            raise CheckpointError(f"config of the draft layers: {key} is {layer[key]!r}, expected {kind}")
    for key in sorted(_ROPE_KEYS & layer.keys()):
        rope = {name: value for name, value in layer[key].items() if value is not None}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if not isinstance(kind, str) or kind not in _ROPE_TYPES:
            at, known = "rope_type" if "rope_type" in rope else "type", ", ".join(sorted(_ROPE_TYPES))
            raise CheckpointError(f"config of the draft layers: {key}.{at} is {kind!r}, expected one of {known}")
        needed = [name for name in _ROPE_TYPES[kind] if not (kind == "dynamic" and "alpha" in rope)]
        for name in needed:
            if name not in rope:
                raise CheckpointError(f"config of the draft layers: {key} of type {kind!r} has no {name}")
        for name in _ROPE_NUMBERS:
            if name in rope and not number(rope[name]):
                raise CheckpointError(
                    f"config of the draft layers: {key}.{name} is {rope[name]!r}, expected a number above 0"
                )
