"""From what a user writes to what vLLM's EAGLE path understands.

A request for Gumiho becomes ``{"method": "eagle", "model": <folder>, ...}`` where the folder holds only a
config.json, made here from the checkpoint's tensors and the target's config.  The draft architecture in it is what
tells Gumiho from EAGLE further down; weights are read from the checkpoint itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gumiho.catalogue import find_checkpoint, resolve
from vllm_gumiho.checkpoint import (
    ARCHITECTURE,
    SPECULATORS_TYPE,
    Checkpoint,
    CheckpointError,
    looks_like_gumiho,
    open_checkpoint,
    speculators_config,
    write_json,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig

METHOD = "gumiho"
LOAD_FORMAT = "gumiho"
AUTO = "auto"
# Model runner V2 drafts with so many; the others go to V1.
V2_SERIAL_STEPS = 2
logger = logging.getLogger("vllm.vllm_gumiho")


def asks_for_gumiho(spec: dict[str, Any]) -> bool:
    """Whether a speculative config, as the user wrote it, means Gumiho."""
    method, model = spec.get("method"), spec.get("model")
    if method == METHOD or model == METHOD:
        return True
    if method not in (None, "eagle") or not isinstance(model, str):
        return False
    return looks_like_gumiho(model) or model.lower().startswith("amd/gumiho-")


def rewrite(
    spec: dict[str, Any], target: ModelConfig, parallel: ParallelConfig, target_load_format: str
) -> dict[str, Any]:
    """The EAGLE-family speculative config that drafts with Gumiho for this target.

    spec: the user's dict, for which `asks_for_gumiho` holds; it is not changed.

    Raises: CheckpointError (a ValueError) naming what is wrong with the checkpoint, the target or the values.
    """
    spec = dict(spec)
    where, path = locate(spec, target)
    checkpoint = open_checkpoint(path)
    check_features(spec, parallel)
    tokens = _draft_length(spec.get("num_speculative_tokens"), checkpoint)
    _check_schedule(spec.get("num_speculative_tokens_per_batch_size"), tokens)
    draft_config = derive_draft_config(checkpoint, target)
    if target_load_format != "dummy":
        checkpoint.verify(target.get_vocab_size())
    spec |= {
        "method": "eagle",
        "model": str(_publish(draft_config)),
        "num_speculative_tokens": tokens,
    }
    spec.pop("revision", None)
    if spec.get("draft_load_config") is not None:
        raise CheckpointError("draft_load_config is not for Gumiho, which reads its checkpoints itself; leave it out")
    if target_load_format != "dummy":
        from vllm.config import LoadConfig

        spec["draft_load_config"] = LoadConfig(load_format=LOAD_FORMAT)
    logger.info(
        "Gumiho: checkpoint %s (%s), %d serial steps, %d heads; drafting %d tokens a step",
        where, checkpoint.layout, checkpoint.sizes.num_serial_steps, checkpoint.sizes.num_heads, tokens,
    )  # fmt: skip
    return spec


def locate(spec: dict[str, Any], target: ModelConfig) -> tuple[str, Path]:
    """The checkpoint a speculative config means: as named (found for the target where it is not), and its local path.

    Raises: CheckpointError for another method, a model that is not a name, and an unknown or missing checkpoint.
    """
    if spec.get("method") not in (None, METHOD, "eagle"):
        raise CheckpointError(f"model 'gumiho' goes with method 'gumiho', not {spec['method']!r}; leave out the method")
    model = spec.get("model")
    if model is not None and not isinstance(model, str):
        raise CheckpointError(f"speculative model {model!r} is not a path or a hub name")
    where = find_checkpoint(target.model) if model in (None, METHOD) else model
    return where, resolve(where, spec.get("revision"))


def derive_draft_config(checkpoint: Checkpoint, target: ModelConfig) -> dict[str, Any]:
    """config.json content for the draft: sizes from the tensors, the rest from the checkpoint, else the target.

    Raises: CheckpointError when hidden size, vocabulary or head dimension do not fit the target.
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
    rope = getattr(text, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0}
    layer.setdefault("hidden_act", "silu")
    layer.setdefault("rms_norm_eps", getattr(text, "rms_norm_eps", 1e-6))
    layer.setdefault("max_position_embeddings", getattr(text, "max_position_embeddings", 2048))
    if layer.get("rope_parameters") in (None, {}) and "rope_theta" not in layer:
        layer["rope_parameters"] = {k: rope[k] for k in rope}
    own = layer.get("rope_parameters")
    if isinstance(own, dict) and own.get("rope_theta") is None and "rope_theta" in rope and "rope_theta" not in layer:
        layer["rope_parameters"] = {**own, "rope_theta": rope["rope_theta"]}
    layer["vocab_size"] = target.get_vocab_size()
    try:
        config = speculators_config(sizes, target.model, layer)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}; correct its config.json or fetch it again") from error
    # Model runner V1 checks drafts of stale tokens for a whole batch once a request is longer than this.
    final = config["transformer_layer_config"]
    final["max_position_embeddings"] = max(final["max_position_embeddings"], target.max_model_len)
    config["gumiho_checkpoint"] = str(checkpoint.path.resolve())
    return config


def update_draft_config(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
    """Speculators algorithm hook: fields of our config.json that the draft model reads, onto its Llama config."""
    for key in ("num_serial_steps", "num_parallel_heads", "fc_bias"):
        if key not in config_dict:
            raise CheckpointError(f"config.json of a {SPECULATORS_TYPE} checkpoint has no {key}; convert it again")
        pre_trained_config[key] = config_dict[key]
    pre_trained_config["architectures"] = [ARCHITECTURE]
    pre_trained_config["gumiho_checkpoint"] = config_dict.get("gumiho_checkpoint")


def is_gumiho(vllm_config: Any) -> bool:
    """Whether an engine config drafts with Gumiho: by its draft architecture."""
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    return ARCHITECTURE in (getattr(getattr(draft, "hf_config", None), "architectures", None) or ())


def lacking_in_v2(vllm_config: Any) -> list[str]:
    """What this engine asks for that Gumiho cannot have in model runner V2, for vLLM's own list of such features.

    V2 of vLLM 0.32 maps LoRA adapters to one row of logits a request, where verification has K + 1: an adapter of the
    LM head would change the text.  V2's serial decode step is recorded together with the heads, for two serial steps.
    """
    serial = vllm_config.speculative_config.draft_model_config.hf_config.num_serial_steps
    lacking = [
        *(["LoRA adapters with Gumiho"] if vllm_config.lora_config is not None else ()),
        *([f"Gumiho with {serial} serial steps"] if serial != V2_SERIAL_STEPS else ()),
    ]
    return [f"{feature} (V1 does: VLLM_USE_V2_MODEL_RUNNER=0)" for feature in lacking]


def _draft_length(asked: Any, checkpoint: Checkpoint) -> int:
    most = checkpoint.sizes.max_draft_tokens
    if asked is None:
        return most
    if isinstance(asked, bool) or not isinstance(asked, int) or not 1 <= asked <= most:
        raise CheckpointError(
            f"num_speculative_tokens={asked!r} with {checkpoint.path}: it drafts {checkpoint.sizes.num_serial_steps} "
            f"serial tokens and {checkpoint.sizes.num_heads} from heads; give a whole number from 1 to {most}, "
            'or "auto"'
        )
    return asked


def _check_schedule(schedule: Any, most: int) -> None:
    """Refuse a wrong schedule here: vLLM looks at it in the engine core only, and cuts a K that is too large."""
    end, rows = 0, [] if schedule is None else schedule
    for row in rows if isinstance(rows, list) and (rows or schedule is None) else [schedule]:
        numbers = isinstance(row, (list, tuple)) and len(row) == 3 and all(type(number) is int for number in row)
        if not numbers or not (end < row[0] <= row[1] and 0 <= row[2] <= most) or (end == 0 and row[0] != 1):
            raise CheckpointError(
                f"num_speculative_tokens_per_batch_size={schedule!r}: at {row!r}, expected [first, last, K] with batch "
                f"sizes rising from 1 and K from 0 to num_speculative_tokens={most}"
            )
        end = row[1]


def check_features(spec: dict[str, Any], parallel: ParallelConfig) -> None:
    """Raises: CheckpointError for pipeline parallelism and for what Gumiho does in its own way."""
    if parallel.pipeline_parallel_size > 1:
        raise CheckpointError(
            f"Gumiho shares the target's embedding and LM head, which pipeline parallelism puts on different workers; "
            f"use pipeline_parallel_size=1 (not {parallel.pipeline_parallel_size}) and tensor parallelism instead"
        )
    if spec.get("parallel_drafting"):
        raise CheckpointError(
            "parallel_drafting is not for Gumiho, whose heads already draft in parallel; leave it out"
        )


def _publish(config: dict[str, Any]) -> Path:
    """Folder with this config.json, named by its content, in vLLM's cache, or a temporary one if that is read-only."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    root = os.environ.get("VLLM_CACHE_ROOT") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "vllm"
    )
    for base in (Path(root).expanduser() / "gumiho", Path(tempfile.gettempdir()) / f"vllm-gumiho-{os.getuid()}"):
        folder = base / digest
        try:
            base.mkdir(parents=True, exist_ok=True, mode=0o700)
            if base.stat().st_uid != os.getuid():
                raise PermissionError(f"{base} belongs to another user")
            folder.mkdir(exist_ok=True)
            write_json(folder / "config.json", config)
        except OSError as error:
            reason = error
            continue
        return folder
    raise CheckpointError(f"no place for the draft's config.json ({reason}); set VLLM_CACHE_ROOT to a writable folder")
