"""config.json of a draft: what vLLM's own config reads, made from a checkpoint's tensors and the target's config."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gumiho.drafters.checkpoints import Checkpoint
from vllm_gumiho.drafters.draft_weights import DraftWeights
from vllm_gumiho.drafters.speculators_config import speculators_config
from vllm_gumiho.drafters.target_config import norm_eps_of, rope_of
from vllm_gumiho.env import CACHE_ROOT, cache_folder
from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.files import digest_of, write_json

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig

logger = logging.getLogger("vllm.vllm_gumiho")


def derive_draft_config(
    checkpoint: Checkpoint,
    target: ModelConfig,
    parallel: ParallelConfig | None = None,
    weights: DraftWeights | None = None,
) -> dict[str, Any]:
    """config.json content for the draft: sizes from the tensors, the rest from the checkpoint, else the target.

    Raises: CheckpointError when hidden size, vocabulary or head dimension do not fit the target, or the target lacks
    what the drafter reads.
    """
    sizes, text = checkpoint.sizes, target.hf_text_config
    if sizes.hidden_size != target.get_hidden_size():
        raise CheckpointError(
            f"{checkpoint.path}: hidden size {sizes.hidden_size} does not fit target {target.model}, which has "
            f"{target.get_hidden_size()}; use a checkpoint trained for this target"
        )
    layer = dict(checkpoint.layer_config)
    vocab = sizes.vocab_size or layer.get("vocab_size")
    if vocab is not None and vocab != target.get_vocab_size():
        raise CheckpointError(
            f"{checkpoint.path}: vocabulary of {vocab} tokens does not fit target {target.model}, which has "
            f"{target.get_vocab_size()}; use a checkpoint trained for this target"
        )
    if not layer.get("num_attention_heads"):
        head_dim = target.get_head_size()
        if sizes.query_size % head_dim or sizes.key_size % head_dim:
            raise CheckpointError(
                f"{checkpoint.path}: q_proj and k_proj have {sizes.query_size} and {sizes.key_size} rows, not "
                f"multiples of the head dimension {head_dim} of target {target.model}, and there is no config.json "
                "with num_attention_heads; add one"
            )
        layer |= {
            "num_attention_heads": sizes.query_size // head_dim,
            "num_key_value_heads": sizes.key_size // head_dim,
        }
    rope = rope_of(text)
    layer.setdefault("hidden_act", "silu")
    layer.setdefault("rms_norm_eps", norm_eps_of(text))
    layer.setdefault("max_position_embeddings", getattr(text, "max_position_embeddings", 2048))
    if layer.get("rope_parameters") in (None, {}) and "rope_theta" not in layer:
        layer["rope_parameters"] = dict(rope)
    own = layer.get("rope_parameters")
    if isinstance(own, dict) and own.get("rope_theta") is None and "rope_theta" in rope and "rope_theta" not in layer:
        layer["rope_parameters"] = {**own, "rope_theta": rope["rope_theta"]}
    layer["vocab_size"] = target.get_vocab_size()
    try:
        config = speculators_config(checkpoint.drafter, sizes, target.model, layer)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}; correct its config.json or fetch it again") from error
    final = config["transformer_layer_config"]
    _reach_all_positions(checkpoint, final, dict(rope), target.max_model_len)
    config |= checkpoint.drafter.fit(checkpoint.path, sizes, target, parallel)
    config |= (weights or DraftWeights()).config_fields()
    config["gumiho_checkpoint"] = str(checkpoint.path.resolve())
    return config


def _reach_all_positions(checkpoint: Checkpoint, layer: dict[str, Any], rope: dict[str, Any], length: int) -> None:
    """Give the draft layers a position for each of the target's; ``rope`` is the target's own.

    Past the draft's last one, model runner V1 checks drafts of stale tokens for a whole batch, and vLLM 0.33 takes a
    smaller ``max_model_len`` for the target in V2.
    """
    layer["max_position_embeddings"] = max(layer["max_position_embeddings"], length)
    own = layer.get("rope_scaling") or layer.get("rope_parameters") or {}
    reach = _fixed_reach(own)
    if reach is None or reach >= length or own == rope:
        return
    logger.warning(
        "%s: its rope (%s) reaches %d positions, the target is served with %d; drafting with the target's rope",
        checkpoint.path, own.get("rope_type", own.get("type")), reach, length,
    )  # fmt: skip
    for key in ("rope_parameters", "rope_scaling", "rope_theta"):
        layer.pop(key, None)
    layer["rope_parameters"] = rope


def _fixed_reach(rope: dict[str, Any]) -> int | None:
    """How many positions a rope has in vLLM whatever ``max_position_embeddings`` says; None where that decides."""
    kind, original = rope.get("rope_type", rope.get("type")), rope.get("original_max_position_embeddings")
    if kind in ("yarn", "deepseek_yarn", "deepseek_llama_scaling"):
        return int(original * rope["factor"])
    return original if kind == "longrope" else None


def publish(config: dict[str, Any]) -> Path:
    """Folder with this config.json, named by its content, in vLLM's cache, or a temporary one if that is read-only.

    Raises: CheckpointError where neither can be written.
    """
    reason: OSError | None = None
    for make in (cache_folder, lambda: Path(tempfile.gettempdir()) / f"vllm-gumiho-{os.getuid()}"):
        try:
            base = make()
            folder = base / digest_of(config)
            base.mkdir(parents=True, exist_ok=True, mode=0o700)
            if base.stat().st_uid != os.getuid():
                raise PermissionError(f"{base} belongs to another user")
            folder.mkdir(exist_ok=True)
            write_json(folder / "config.json", config)
        except OSError as error:
            reason = error
            continue
        return folder
    raise CheckpointError(
        f"no place for the draft's config.json ({reason}); set {CACHE_ROOT.name} to a writable folder"
    )
