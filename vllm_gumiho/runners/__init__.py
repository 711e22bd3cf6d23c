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
