"""A target as transformers runs it: its class, its attention, and what its config says of features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vllm_gumiho.errors import DataError, TargetError
from vllm_gumiho.training.data import Sample

# Rope types whose frequencies follow the longest sequence of a pass.
_BY_LENGTH = ("dynamic", "longrope")


def load_target(folder: str) -> nn.Module:
    """The causal LM of a folder or hub name, in float32.

    A target of text and images is taken by its whole class; it is given text alone.

    Raises: TargetError where transformers has no such model, or cannot run it.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    try:
        config = AutoConfig.from_pretrained(folder)
        causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(
            config, "auto_map", {}
        )
        kind = AutoModelForCausalLM if causal else AutoModelForImageTextToText
        attention = "eager" if _caps_attention(config) else "sdpa"
        try:
            return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise TargetError(
            f"target {folder}: transformers cannot run it as a causal LM ({type(error).__name__}: {reason}); heads are "
            "trained for causal language models alone"
        ) from error


def passes_alone(config: Any) -> bool:
    """Whether a sequence's features hang on the others of its pass, so that each takes a pass of its own."""
    return any(rope.get("rope_type") in _BY_LENGTH for rope in ropes_of(config))


def ropes_of(config: Any) -> list[dict[str, Any]]:
    """The rope settings of a target's config, one a kind of layer."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [each for each in rope.values() if isinstance(each, dict)]
    return nested or [rope]


def _caps_attention(config: Any) -> bool:
    """Whether attention scores have a soft cap, which fused attention leaves out."""
    text = config.get_text_config()
    names = ("attn_logit_softcapping", "attention_logit_cap", "attn_logit_cap")
    return any(getattr(text, name, None) for name in names)


def refuse_placeholders(samples: Iterable[Sample], config: Any, name: str) -> None:
    """Refuse samples that stand for more than text: their tokens do not tell the images, sounds or videos in them.

    config: the target's, which names such tokens.  Raises: DataError.
    """
    kinds = ("image", "video", "audio", "vision")
    keys = [f"{kind}_token_{end}" for kind in kinds for end in ("id", "index")]
    marks = {value for key in keys if isinstance(value := getattr(config, key, None), int)}
    for sample in samples if marks else ():
        if found := marks.intersection(sample.tokens()[0]):
            raise DataError(
                f"sample {sample.id}: token {min(found)} stands for an image, a video or a sound of target {name}, "
                "which the samples do not hold; train on text alone, and serve images with that head"
            )
