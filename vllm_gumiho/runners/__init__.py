"""vLLM's model runners: how each schedules a drafter's passes.  V1 on the CPU and as a fallback, V2 on a GPU."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("vllm.vllm_gumiho")


def finish_loading(model: Any, num_speculative_tokens: int, runner: str) -> None:
    """Let a loaded draft model choose its kernels, and say in one line what drafts, and by which."""
    choice, ranks = model.finish_loading(), model.heads.ranks
    logger.info(
        "Gumiho drafts with %s: K=%d, model runner %s, %s%s",
        model.config.gumiho_checkpoint,
        num_speculative_tokens,
        runner,
        choice.describe(),
        f", heads shared by {ranks} ranks" if ranks > 1 else "",
    )


def leave_single_launch(model: Any) -> bool:
    """Once a draft: whether its heads go from one launch to one per stage from now on, as a wait has given up."""
    left: bool = model.heads.leave_single_launch()
    if left:
        logger.warning(
            "Gumiho: a program of the heads' single launch waited for the others in vain; the heads take one launch "
            "per stage from now on. Drafts since then may have been rejected, texts are right. Please report it; "
            "VLLM_GUMIHO_KERNELS=0 turns the kernels off"
        )
    return left
