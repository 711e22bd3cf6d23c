"""Figures over several sets of prompts, and where greedy answers part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm_gumiho.engines.counters import ratio


def mean_over_sets(sets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Unweighted mean over the sets of what `acceptance` gives, totals of the rest, tokens/s of the totals."""
    mean: dict[str, Any] = {
        name: sum(one[name] for one in sets) / len(sets) for name in ("acceptance_length", "accepted_per_step")
    }
    for name in ("acceptance_per_position", "conditional_accuracy_per_position"):
        positions = zip(*(one[name] for one in sets), strict=True)
        mean[name] = [_mean([value for value in values if value is not None]) for values in positions]
    for name in ("prompts", "output_tokens", "seconds", "drafts", "draft_tokens", "accepted_tokens"):
        mean[name] = sum(one[name] for one in sets)
    mean["output_tokens_per_s"] = ratio(mean["output_tokens"], mean["seconds"])
    compared = [one["equal"] for one in sets if one["equal"] is not None]
    mean["equal"] = sum(compared) if compared else None
    return mean


def differences(
    off: dict[str, list[list[int]]], on: dict[str, list[list[int]]], names: Iterable[str]
) -> list[dict[str, Any]]:
    """First place where each named prompt's answers part: ``{id, turn, position, off, on}``, None past an end.

    off, on: token ids by prompt, one list a turn.
    """
    found = []
    for name in names:
        for turn, (a, b) in enumerate(zip(off[name], on[name], strict=True)):
            if a == b:
                continue
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            first = {"off": a[at] if at < len(a) else None, "on": b[at] if at < len(b) else None}
            found.append({"id": name, "turn": turn, "position": at, **first})
            break
    return found


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
