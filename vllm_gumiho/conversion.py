"""Checkpoints into the speculators format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_gumiho.checkpoint import Checkpoint, CheckpointError, open_checkpoint, save_speculators

_FROM_TARGET = ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "vocab_size")


def convert_checkpoint(source: Path, destination: Path, target: str | None = None, int8: bool = False) -> Checkpoint:
    """Write ``source`` as a speculators checkpoint at ``destination``, tensors bit for bit unless ``int8``.

    target: whose config fills in what the source's lacks (head counts, RoPE, vocabulary); by default the verifier
    that the source names.

    Raises: CheckpointError when the source is unusable, ``destination`` exists and is not empty, or head counts are
    known from neither the source nor a target.
    """
    opened = open_checkpoint(source)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination}: exists and is not empty; give a new folder")
    opened.verify()
    target = target or opened.verifier
    layer = dict(opened.layer_config)
    if target is None and not layer.get("num_attention_heads"):
        raise CheckpointError(f"{source}: has no config.json with num_attention_heads; name the target with --target")
    if target is not None:
        layer = _fill(layer, target, opened)
    tensors = dict(opened.tensors(keep_int8=not int8))
    return save_speculators(destination, tensors, target or "unknown", layer, int8)


def _fill(layer: dict[str, Any], target: str, opened: Checkpoint) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(target).get_text_config()
    except (OSError, ValueError) as error:
        if layer.get("num_attention_heads"):
            return layer
        raise CheckpointError(
            f"target {target}: its config cannot be read ({type(error).__name__}: {error})"
        ) from error
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    from_target = {key: getattr(config, key) for key in _FROM_TARGET if getattr(config, key, None) is not None}
    if "rope_theta" in layer or "rope_parameters" in layer:
        from_target.pop("rope_parameters", None)
    heads = {
        "num_attention_heads": opened.sizes.query_size // head_dim,
        "num_key_value_heads": opened.sizes.key_size // head_dim,
    }
    return {**heads, **from_target, **layer}
