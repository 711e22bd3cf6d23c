"""Drafters: a room for each architecture, and what they share.

`DRAFTERS` is the registry: everything outside of this room finds an architecture there, and names none.
"""

from __future__ import annotations

from typing import Any

from vllm_gumiho.drafters.gumiho import GUMIHO, LAYERED_GUMIHO
from vllm_gumiho.drafters.moa import MOA
from vllm_gumiho.drafters.protocol import Drafter, Sizes

__all__ = [
    "DEFAULT", "DRAFTERS", "PER_REQUEST", "SAME", "SEEDED_TEXT", "TRAINABLE", "Drafter", "Sizes", "drafter_of",
    "lacking_in_v2",
]  # fmt: skip

DRAFTERS: dict[str, Drafter] = {drafter.name: drafter for drafter in (GUMIHO, LAYERED_GUMIHO, MOA)}
DEFAULT = GUMIHO

# Keys of the speculative config, and of the draft's config.json, by which they reach the model runner.
PER_REQUEST = "num_speculative_tokens_per_request"
SEEDED_TEXT, SAME = "seeded_text", "same"

# Trained here: our drafters, and those that vLLM serves itself, for comparison.
TRAINABLE = {name: drafter.trainable for name, drafter in DRAFTERS.items()}
TRAINABLE |= {"eagle": "vllm_gumiho.drafters.eagle.trainable:EagleDrafter"}


def drafter_of(vllm_config: Any) -> Drafter | None:
    """The drafter of an engine's config, by its draft architecture; None where it is none of ours."""
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    architectures = getattr(getattr(draft, "hf_config", None), "architectures", None) or ()
    return next((drafter for drafter in DRAFTERS.values() if drafter.architecture in architectures), None)


def lacking_in_v2(vllm_config: Any) -> list[str]:
    """What model runner V2 would do wrong or not at all for the drafter of this config; empty for none of ours."""
    drafter = drafter_of(vllm_config)
    if drafter is None:
        return []
    lacking = drafter.lacking_in_v2(vllm_config)
    if getattr(vllm_config.speculative_config.draft_model_config.hf_config, PER_REQUEST, None) is not None:
        lacking.append(f"{PER_REQUEST} (V1 does; V2 has vLLM's own enable_adaptive_verification)")
    return lacking
