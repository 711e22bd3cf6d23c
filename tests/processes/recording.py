"""What an engine drafts, and from what, kept step by step."""

from __future__ import annotations

from typing import Any

from vllm_gumiho.engines.record import watch_drafts

Drafts = list[tuple[list[int], list[int]]]
Features = list[list[list[float]]]


def record_drafts(llm: Any) -> tuple[Drafts, Features]:
    """Two lists that fill, an entry a draft: verified tokens of a request and the drafted ones; what each came from.

    The second stays empty where the draft model is in another process, or finds its tokens in another way.
    """
    worker = getattr(getattr(llm.llm_engine.model_executor, "driver_worker", None), "worker", None)
    runner = getattr(worker, "model_runner", None)
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    seen = _watch_features(getattr(drafter, "model", None))
    drafts: Drafts = []
    features: Features = []

    def add(_request: str, text: list[int], tokens: list[int], row: int) -> None:
        drafts.append((text, tokens))
        if seen:
            features.append([hidden[row].tolist() for hidden in seen[-len(tokens) :]])

    watch_drafts(llm, add)
    return drafts, features


def _watch_features(model: Any) -> list[Any]:
    """A list that fills with what the tokens of each step come from, ``[requests, H]`` a step."""
    seen: list[Any] = []
    if not hasattr(model, "get_top_tokens"):
        return seen
    find = model.get_top_tokens

    def watching(hidden_states: Any) -> Any:
        seen.append(hidden_states.clone())
        return find(hidden_states)

    model.get_top_tokens = watching
    return seen
