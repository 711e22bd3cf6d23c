"""Wrong walks, planted in an engine's process: each gives out plausible text, at the drafts' usual acceptance."""

from __future__ import annotations

from typing import Any

import torch


def right() -> tuple[Any, Any, Any]:
    """The module with what it had, whatever was planted before; its walk and its verification."""
    from vllm_gumiho.runners import sample_and_walk

    kept = vars(sample_and_walk).setdefault("_kept", (sample_and_walk.walk, sample_and_walk.SampleAndWalk._verify))
    sample_and_walk.walk, sample_and_walk.SampleAndWalk._verify = kept
    return sample_and_walk, *kept


def walk_too_far() -> None:
    """The first draft is given out whatever was drawn: what a walk does that compares a row too late."""
    sample_and_walk, walk, _ = right()

    def wrong(drawn: Any, drafts: Any, cu_num_logits: Any, steps: int) -> Any:
        first, last = cu_num_logits[:-1], cu_num_logits[1:]
        drafted = last - first > 1
        forced = drafts[(first + 1).clamp(max=drafts.shape[0] - 1)].to(drawn.dtype)
        drawn = drawn.index_copy(0, first.long(), torch.where(drafted & (forced >= 0), forced, drawn[first]))
        return walk(drawn, drafts, cu_num_logits, steps)

    sample_and_walk.walk = wrong


def repeat_noise() -> None:
    """Every row of a request has the noise of its first: each token alone has the right distribution."""
    sample_and_walk, _, verify = right()

    def wrong(self: Any, logits: Any, draft_logits: Any, draft_sampled: Any, pos: Any, *args: Any) -> Any:
        local = args[4]  # expanded_local_pos
        return verify(self, logits, draft_logits, draft_sampled, pos - local, *args)

    sample_and_walk.SampleAndWalk._verify = wrong


FAULTS = {"walks too far": walk_too_far, "repeats noise": repeat_noise}
