"""``"seeded_text": "same"``: what goes with sample and walk, which gives it."""

from __future__ import annotations

from typing import Any

from vllm_gumiho.drafters import PER_REQUEST, SAME, SEEDED_TEXT
from vllm_gumiho.errors import CheckpointError


def seeded_text(spec: dict[str, Any]) -> str | None:
    """The value of a speculative config's key, None for vLLM's own draws.

    Raises: CheckpointError for another value, or another way of verifying or of making drafts beside it.
    """
    asked: str | None = spec.get(SEEDED_TEXT)
    if asked is None:
        return None
    if asked != SAME:
        raise CheckpointError(f'{SEEDED_TEXT} is {asked!r}, expected "{SAME}"; or leave it out, for vLLM\'s own draws')
    drafts, rejection = spec.get("draft_sample_method"), spec.get("rejection_sample_method")
    for key, value, plain in (
        ("draft_sample_method", drafts, "greedy"),
        ("rejection_sample_method", rejection, "standard"),
        (PER_REQUEST, spec.get(PER_REQUEST), None),
    ):
        if value not in (None, plain):
            raise CheckpointError(
                f'{SEEDED_TEXT} "{SAME}" verifies greedy drafts by sample and walk in model runner V2, which {key} '
                f"{value!r} does not go with; leave one of them out"
            )
    return asked
