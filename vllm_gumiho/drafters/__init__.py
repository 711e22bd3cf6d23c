"""Drafters: a room for each architecture, and what they share.

`DRAFTERS` is the registry: everything outside of this room finds an architecture there, and names none.
"""

from __future__ import annotations

from typing import Any

from vllm_gumiho.drafters.gumiho import GUMIHO
from vllm_gumiho.drafters.moa import MOA
from vllm_gumiho.drafters.protocol import Drafter, Sizes

__all__ = ["DEFAULT", "DRAFTERS", "TRAINABLE", "Drafter", "Sizes", "drafter_of"]

DRAFTERS: dict[str, Drafter] = {GUMIHO.name: GUMIHO, MOA.name: MOA}
DEFAULT = GUMIHO

# Trained here: our drafters, and those that vLLM serves itself, for comparison.
TRAINABLE = {name: drafter.trainable for name, drafter in DRAFTERS.items()}
TRAINABLE |= {"eagle": "vllm_gumiho.drafters.eagle.trainable:EagleDrafter"}


def drafter_of(vllm_config: Any) -> Drafter | None:
    """The drafter of an engine's config, by its draft architecture; None where it is none of ours."""
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    architectures = getattr(getattr(draft, "hf_config", None), "architectures", None) or ()
    return next((drafter for drafter in DRAFTERS.values() if drafter.architecture in architectures), None)
