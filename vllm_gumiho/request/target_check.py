"""Whether a target can be drafted for and trained for, by its config alone: nothing is downloaded or loaded."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_gumiho.drafters.target_layers import gives_states
from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.request.catalogue import find_checkpoint
from vllm_gumiho.request.kv_groups import tears_drafts_apart

# Kinds of target that the tests serve and train for (docs/targets.md), by transformers' names.
TESTED = (
    "cohere2", "exaone4", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama",
    "minicpm3", "mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3",
    "stablelm", "starcoder2",
)  # fmt: skip
# Of a drafter as trained by default.
DRAFT_LAYERS = 2


@dataclass(frozen=True)
class Verdict:
    """What is known of a target.  unserved, untrained: why not, None where it can be; notes: limits."""

    target: str
    kind: str
    architecture: str
    unserved: str | None
    untrained: str | None
    checkpoint: str | None
    notes: tuple[str, ...]


def problem_of(text: Any, name: str) -> str | None:
    """Why no drafter of ours can draft for a target, None where nothing is known against it.

    text: the target's Hugging Face text config.
    """
    if getattr(text, "is_encoder_decoder", False):
        return f"target {name}: {text.model_type} has an encoder, drafts come from a decoder alone; use a causal LM"
    width = getattr(text, "word_embed_proj_dim", None) or getattr(text, "embedding_size", None)
    if isinstance(width, int) and width != text.hidden_size:
        return (
            f"target {name}: its embedding has {width} values a token and its features {text.hidden_size}, which draft "
            "layers take as of one size; use another target"
        )
    return None


def check_target(target: str) -> Verdict:
    """Of a folder, or of a hub name whose config is in the hub's cache.

    Raises: CheckpointError where there is no config on this machine, or none that transformers knows.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(Path(target).expanduser()), local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"target {target}: no config of it on this machine ({type(error).__name__}: {reason}); give a folder, or "
            "fetch the target's config.json"
        ) from error
    architecture = next(iter(config.architectures or ()), "")
    unserved = problem_of(config.get_text_config(), target) or _unknown_to_vllm(target, architecture)
    try:
        checkpoint = find_checkpoint(target)
    except CheckpointError:
        checkpoint = None
    return Verdict(
        target,
        config.model_type,
        architecture,
        unserved,
        _untrained(config, target),
        checkpoint,
        tuple(_notes(config)) + (() if unserved else _without_states(architecture)),
    )


def _unknown_to_vllm(target: str, architecture: str) -> str | None:
    registry = importlib.import_module("vllm.model_executor.models.registry")
    if architecture in registry.ModelRegistry.get_supported_archs():
        return None
    named = architecture or "a config without architectures"
    return f"target {target}: vLLM has no class for {named}; use another target"


def _untrained(config: Any, name: str) -> str | None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    known = any(type(config) in mapping for mapping in mappings)
    if known and not getattr(config, "is_encoder_decoder", False):
        return None
    return f"target {name}: transformers has no causal LM for {config.model_type}; heads are trained for these alone"


def _without_states(architecture: str) -> tuple[str, ...]:
    """A note where vLLM's class of the target gives the last state alone."""
    registry = importlib.import_module("vllm.model_executor.models.registry")
    try:
        kind = registry.ModelRegistry.models[architecture].load_model_cls()
    except (ImportError, RuntimeError):  # a package that this class wants is not there, or of another build
        return ()
    if gives_states(kind):
        return ()
    return (f"vLLM's class {kind.__name__} gives no states of inner layers: moa and gumiho-layers cannot draft for it",)


def _notes(config: Any) -> list[str]:
    text, notes = config.get_text_config(), []
    if text.model_type not in TESTED:
        notes.append(f"{text.model_type} is not among the kinds that the tests serve and train for")
    if text is not config:
        notes.append("drafts from text: where a prompt has images, drafts do not see them; heads are trained on text")
    if tears_drafts_apart(text, DRAFT_LAYERS):
        notes.append("its windows save no KV cache beside a drafter (disable_hybrid_kv_cache_manager)")
    return notes
