"""``draft_weights``: in how many bits a drafter's weights are kept and read.

Verification keeps the text whatever a draft rounds; fewer bytes are read a draft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_gumiho.drafters.checkpoints import Checkpoint
from vllm_gumiho.drafters.speculators_config import WEIGHT_KEYS
from vllm_gumiho.env import DRAFT_WEIGHTS
from vllm_gumiho.errors import DraftWeightsError
from vllm_gumiho.kernels.eight_bit import EIGHT_BIT

KEY = "draft_weights"
AUTO, WIDE = "auto", "bf16"
CHOICES = (AUTO, WIDE, *EIGHT_BIT)
# Of the draft's config.json, which vLLM gives to the draft model.
WEIGHTS_KEY, HEAD_KEY = WEIGHT_KEYS


@dataclass(frozen=True)
class DraftWeights:
    """How a drafter's matrices, and the LM head that it drafts by, are kept: ``bf16``, ``fp8`` or ``int8``.

    ``bf16`` stands for the engine's own dtype, and for the target's own LM head.
    """

    matrices: str = WIDE
    lm_head: str = WIDE

    @staticmethod
    def of(config: Any) -> DraftWeights:
        """What a draft's Hugging Face config says."""
        return DraftWeights(getattr(config, WEIGHTS_KEY, None) or WIDE, getattr(config, HEAD_KEY, None) or WIDE)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the matrices in memory; None for the engine's own."""
        return EIGHT_BIT.get(self.matrices)

    @property
    def head_dtype(self) -> torch.dtype | None:
        """Of the copy of the LM head; None where there is none."""
        return EIGHT_BIT.get(self.lm_head)

    def config_fields(self) -> dict[str, str]:
        """For the draft's config.json."""
        return {WEIGHTS_KEY: self.matrices, HEAD_KEY: self.lm_head}


def asked_for(asked: Any) -> Any:
    """What a request for ``asked`` asks for: None leaves it to the environment, and that to ``auto``."""
    value = DRAFT_WEIGHTS.get()
    return asked if asked is not None else AUTO if value is None else value


def choose(asked: Any, checkpoint: Checkpoint) -> DraftWeights:
    """What a request for ``asked``, None for the environment's word, means for this checkpoint.

    ``auto``: matrices as the checkpoint has them, the target's own LM head.  On a CPU an int8 checkpoint drafts by an
    int8 copy of the LM head too: with it drafts take half their time there (docs/results/draft-weights.md).

    Raises: DraftWeightsError for another value, and for 8 bits with a drafter that has no such model.
    """
    source, asked = DRAFT_WEIGHTS.name if asked is None else KEY, asked_for(asked)
    if asked not in CHOICES:
        raise DraftWeightsError(
            f"{source}={asked!r} is not a choice; set it to auto (the default: as the checkpoint is), bf16 (the "
            "engine's own dtype), fp8 or int8"
        )
    takes = checkpoint.drafter.takes_eight_bits
    if asked == AUTO:
        kept = (checkpoint.eight_bit if takes else None) or WIDE
        return DraftWeights(kept, kept if kept == "int8" and _on_cpu() else WIDE)
    if asked != WIDE and not takes:
        raise DraftWeightsError(
            f"{source}={asked!r} with {checkpoint.path}: {checkpoint.drafter.title} drafts in the engine's own dtype; "
            "set it to auto"
        )
    return DraftWeights(asked, asked)


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
