"""vLLM's model runners: how each schedules a drafter's passes.  V1 on the CPU and as a fallback, V2 on a GPU."""

from __future__ import annotations

import logging
from typing import Any

from vllm_gumiho.drafters import SAME, SEEDED_TEXT, drafter_of
from vllm_gumiho.drafters.target_layers import LAYERS_KEY

logger = logging.getLogger("vllm.vllm_gumiho")


def view_of(target_model: Any, vllm_config: Any) -> Any:
    """The target as vLLM's loading of an EAGLE draft looks for it."""
    from vllm_gumiho.drafters import target_view

    config = vllm_config.model_config
    return target_view.view_of(target_model, config.model, config.get_vocab_size())


def finish_loading(model: Any, target_model: Any, vllm_config: Any, runner: str) -> None:
    """Let a loaded draft model choose its kernels, and say in one line what drafts, and by which."""
    drafter = drafter_of(vllm_config)
    assert drafter is not None
    model.take_logits(target_model)
    if 0 in getattr(model.config, LAYERS_KEY, ()):
        from vllm_gumiho.drafters import layer_0

        layer_0.keep_layer_0(target_model, vllm_config.model_config.model)
    logger.info(
        "%s drafts with %s: K=%d, model runner %s, %s",
        drafter.title,
        model.config.gumiho_checkpoint,
        vllm_config.speculative_config.num_speculative_tokens,
        runner,
        model.finish_loading(),
    )


def wants_same_seeded_text(vllm_config: Any) -> bool:
    """Whether seeded requests are to give the text that they give without speculation; the draft's config says so."""
    return getattr(vllm_config.speculative_config.draft_model_config.hf_config, SEEDED_TEXT, None) == SAME


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
