"""vLLM's own speculative decoding counters, summed over engines, and what they say.

Acceptance length is 1 + accepted / drafts, where a draft is one verified chain of up to K tokens.  Acceptance at
position i counts drafts accepted up to and including it; conditional accuracy at i is that over the same at i - 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_PREFIX = "vllm:spec_decode_num_"


@dataclass(frozen=True)
class Counts:
    """Counters of one engine: chains, tokens in them, tokens accepted, and accepted at each of K positions."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()

    def __sub__(self, before: Counts) -> Counts:
        """What was counted since ``before``, an earlier reading of the same engine (perhaps of no draft yet)."""
        earlier = before.accepted_per_position or (0,) * len(self.accepted_per_position)
        return Counts(
            self.drafts - before.drafts,
            self.draft_tokens - before.draft_tokens,
            self.accepted_tokens - before.accepted_tokens,
            tuple(now - then for now, then in zip(self.accepted_per_position, earlier, strict=True)),
        )


def read_counts(metrics: Iterable[Any]) -> Counts:
    """Counters out of ``LLM.get_metrics()``, summed over data-parallel engines; zeros without speculation."""
    sums = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0}
    per_position: list[int] = []
    for metric in metrics:
        name = metric.name.removeprefix(_PREFIX)
        if metric.name == f"{_PREFIX}accepted_tokens_per_pos":
            values = list(metric.values)
            per_position = [a + b for a, b in zip(per_position or [0] * len(values), values, strict=True)]
        elif name in sums and metric.name != name:
            sums[name] += int(metric.value)
    return Counts(**sums, accepted_per_position=tuple(per_position))


def acceptance(counts: Counts, num_speculative_tokens: int | str) -> dict[str, Any]:
    """Figures of one set.  Without any draft each step made one token: acceptance length 1, nothing accepted.

    num_speculative_tokens: "auto" for as many positions as the engine counts.
    Conditional accuracy is None where no draft was accepted up to the position before.
    """
    accepted = list(counts.accepted_per_position)
    if isinstance(num_speculative_tokens, int):
        accepted = [*accepted, *[0] * num_speculative_tokens][:num_speculative_tokens]
    reached = [counts.drafts, *accepted]
    return {
        "acceptance_length": 1 + ratio(counts.accepted_tokens, counts.drafts),
        "accepted_per_step": ratio(counts.accepted_tokens, counts.drafts),
        "acceptance_per_position": [ratio(count, counts.drafts) for count in accepted],
        "conditional_accuracy_per_position": [
            now / before if before else None for before, now in zip(reached, accepted, strict=False)
        ],
    }


def ratio(part: float, whole: float) -> float:
    """``part / whole``, 0 of nothing."""
    return part / whole if whole else 0.0
