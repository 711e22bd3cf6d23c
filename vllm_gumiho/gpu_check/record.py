"""What an engine in this process drafts, beside the text that it drafts for."""

from __future__ import annotations

from typing import Any


def record_drafts(llm: Any) -> list[tuple[list[int], list[int]]]:
    """A list that fills with the verified tokens of a request and what was drafted after them, one entry a draft."""
    if llm.llm_engine.vllm_config.use_v2_model_runner:
        return _record_speculator(llm.llm_engine.model_executor.driver_worker.worker.model_runner)
    scheduler, drafts = llm.llm_engine.engine_core.engine_core.scheduler, []
    update = scheduler.update_draft_token_ids

    def recording(found: Any) -> None:
        update(found)
        for name, tokens in zip(found.req_ids, found.draft_token_ids, strict=True):
            request = scheduler.requests.get(name)
            if request is not None and request.spec_token_ids:
                drafts.append((list(request.all_token_ids), list(tokens)))

    scheduler.update_draft_token_ids = recording
    return drafts


def _record_speculator(runner: Any) -> list[tuple[list[int], list[int]]]:
    """Model runner V2 keeps draft tokens from the scheduler: they are read where they are made."""
    states, drafts, propose = runner.req_states, [], runner.speculator.propose

    def recording(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        found = propose(input_batch, *args, **kwargs)
        num_sampled = args[4]
        for row, slot in enumerate(input_batch.idx_mapping.tolist()):
            if num_sampled[row] > 0:  # else more of its prompt is to come
                text = states.all_token_ids.gpu[slot, : int(states.total_len.gpu[slot])]
                drafts.append((text.tolist(), found[row].tolist()))
        return found

    runner.speculator.propose = recording
    return drafts
