"""What an engine drafts, and from what, kept step by step."""

from __future__ import annotations

from typing import Any

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

    def add(text: list[int], tokens: list[int], row: int) -> None:
        drafts.append((text, tokens))
        if seen:
            features.append([hidden[row].tolist() for hidden in seen[-len(tokens) :]])

    if llm.llm_engine.vllm_config.use_v2_model_runner:
        _record_speculator(runner, add)
    else:
        _record_scheduler(llm.llm_engine.engine_core.engine_core.scheduler, add)
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


def _record_scheduler(scheduler: Any, add: Any) -> None:
    """Model runner V1 gives its draft tokens to the scheduler."""
    update = scheduler.update_draft_token_ids

    def recording(found: Any) -> None:
        update(found)
        for row, (name, tokens) in enumerate(zip(found.req_ids, found.draft_token_ids, strict=True)):
            request = scheduler.requests.get(name)
            if request is not None and request.spec_token_ids:
                add(list(request.all_token_ids), list(tokens), row)

    scheduler.update_draft_token_ids = recording


def _record_speculator(runner: Any, add: Any) -> None:
    """Model runner V2 keeps draft tokens from the scheduler: they are read where they are made."""
    states, propose = runner.req_states, runner.speculator.propose

    def recording(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        found = propose(input_batch, *args, **kwargs)
        num_sampled = args[4]
        for row, slot in enumerate(input_batch.idx_mapping.tolist()):
            if num_sampled[row] > 0:  # else more of its prompt is to come
                text = states.all_token_ids.gpu[slot, : int(states.total_len.gpu[slot])]
                add(text.tolist(), found[row].tolist(), row)
        return found

    runner.speculator.propose = recording
