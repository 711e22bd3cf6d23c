"""What an engine in this process drafts, beside the text that it drafts for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_gumiho.errors import EngineError

Add = Callable[[str, list[int], list[int], int], None]


def record_drafts(llm: Any) -> list[tuple[list[int], list[int]]]:
    """A list that fills with the verified tokens of a request and what was drafted after them, one entry a draft."""
    drafts: list[tuple[list[int], list[int]]] = []
    watch_drafts(llm, lambda _request, text, tokens, _row: drafts.append((text, tokens)))
    return drafts


def watch_drafts(llm: Any, add: Add) -> None:
    """Call ``add(request, text, tokens, row)`` for each draft: verified and drafted tokens, and the batch's row.

    Raises: EngineError for runner V1 with async scheduling, whose drafts stay in the worker.
    """
    if llm.llm_engine.vllm_config.use_v2_model_runner:
        _watch_speculator(llm.llm_engine.model_executor.driver_worker.worker.model_runner, add)
    elif llm.llm_engine.vllm_config.scheduler_config.async_scheduling:
        raise EngineError("drafts of runner V1 cannot be watched with async scheduling; give async_scheduling=False")
    else:
        _watch_scheduler(llm.llm_engine.engine_core.engine_core.scheduler, add)


def _watch_scheduler(scheduler: Any, add: Add) -> None:
    """Model runner V1 gives its draft tokens to the scheduler."""
    update = scheduler.update_draft_token_ids

    def recording(found: Any) -> None:
        update(found)
        for row, (name, tokens) in enumerate(zip(found.req_ids, found.draft_token_ids, strict=True)):
            request = scheduler.requests.get(name)
            if request is not None and request.spec_token_ids:
                add(name, list(request.all_token_ids), list(tokens), row)

    scheduler.update_draft_token_ids = recording


def _watch_speculator(runner: Any, add: Add) -> None:
    """Model runner V2 keeps draft tokens from the scheduler: they are read where they are made."""
    states, propose = runner.req_states, runner.speculator.propose

    def recording(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        found = propose(input_batch, *args, **kwargs)
        num_sampled = args[4]
        for row, slot in enumerate(input_batch.idx_mapping.tolist()):
            # Else more of its prompt is to come; from vLLM 0.33 on, a step after which no request goes on has no draft.
            if num_sampled[row] > 0 and int(found[row][0]) >= 0:
                text = states.all_token_ids.gpu[slot, : int(states.total_len.gpu[slot])]
                add(input_batch.req_ids[row], text.tolist(), found[row].tolist(), row)
        return found

    runner.speculator.propose = recording
