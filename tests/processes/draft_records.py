"""Records what an engine drafts, in both model runners, where its drafter is in this process; else by its scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from draft_check import Draft, Record, check
from release import watermark_contexts
from torch import Tensor

from vllm_gumiho.drafters import drafter_of
from vllm_gumiho.drafters.draft_weights import DraftWeights
from vllm_gumiho.engines.record import watch_drafts


def runner_of(llm: Any) -> Any:
    """The engine's model runner, None where its workers are processes of their own."""
    worker = getattr(getattr(llm.llm_engine.model_executor, "driver_worker", None), "worker", None)
    return getattr(worker, "model_runner", None)


def drafts_here(llm: Any) -> bool:
    """Whether a drafter of ours drafts."""
    return drafter_of(llm.llm_engine.vllm_config) is not None


def attach(llm: Any) -> Record:
    """A record that fills from now on."""
    record, runner = Record(), runner_of(llm)
    if runner is None:
        _by_scheduler(llm, record)
    elif llm.llm_engine.vllm_config.use_v2_model_runner:
        _by_speculator(runner, record)
    else:
        _by_proposer(llm, runner, record)
    return record


def kept_features(record: Record) -> list[tuple[list[int], list[list[float]]]]:
    """Verified tokens of each request whose features the engine gave its drafter, and these, ``[T - 1, H]``."""
    found = []
    for name, kept in record.features.items():
        tokens = record.texts[name]
        whole = next((i for i in range(len(tokens)) if i not in kept), len(tokens))
        found.append((tokens[: whole + 1], [kept[i].tolist() for i in range(whole)]))
    return found


def compare(llm: Any, record: Record, engines_features: bool = False) -> dict:
    config = llm.llm_engine.vllm_config
    quantised = config.model_config.quantization is not None
    weights = DraftWeights.of(config.speculative_config.draft_model_config.hf_config)
    return check(
        record,
        in_a_folder(config.model_config.model),
        Path(config.speculative_config.draft_model_config.hf_config.gumiho_checkpoint),
        config.model_config.max_model_len,
        exact=config.model_config.dtype == torch.float32,
        engines_features=engines_features or quantised or config.lora_config is not None,
        weights=weights,
        rounded=rounded_parts(llm, weights),
    )


def in_a_folder(model: str) -> Path:
    """A target given by name lies in the hub's cache."""
    from huggingface_hub import snapshot_download  # reads HF_HUB_OFFLINE at its import

    return Path(model if Path(model).is_dir() else snapshot_download(model, local_files_only=True))


def rounded_parts(llm: Any, weights: DraftWeights) -> frozenset[str]:
    """Parts of the draft whose products vLLM's CPU build makes of int8 inputs."""
    runner = runner_of(llm)
    if weights == DraftWeights():
        return frozenset()
    if runner is None:  # workers elsewhere
        return frozenset({"linear", "heads"} if weights.matrices == "int8" else ()) | (
            frozenset({"lm_head"}) if weights.lm_head == "int8" else frozenset()
        )
    model = (getattr(runner, "drafter", None) or runner.speculator).model
    found = {
        "linear": type(getattr(model.model.layers[0].mlp.down_proj, "scheme", None)).__name__
        == "CompressedTensorsW8A8Int8",
        "heads": bool(model.heads._products),
        "lm_head": model.head_matrix is not None and model.head_matrix.packed,
    }
    return frozenset(part for part, yes in found.items() if yes)


def _keep_texts(llm: Any, record: Record) -> None:
    """Texts of requests as they end: what was verified in the end is the prefix of every draft."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    free = scheduler._free_request

    def keeping(request: Any, *args: Any, **kwargs: Any) -> Any:
        record.texts[request.request_id] = list(request.all_token_ids)
        return free(request, *args, **kwargs)

    scheduler._free_request = keeping


def _by_proposer(llm: Any, runner: Any, record: Record) -> None:
    """Runner V1: rows of a step, which go up to each request's last verified token."""
    _keep_texts(llm, record)
    drafter, propose = runner.drafter, runner.drafter.propose

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        starts = kwargs["common_attn_metadata"].query_start_loc.tolist()
        positions, last = kwargs["target_positions"], kwargs["token_indices_to_sample"]
        last = [end - 1 for end in starts[1:]] if last is None else last.tolist()
        names = list(runner.input_batch.req_ids)
        states, temperatures = kwargs["target_hidden_states"], kwargs["sampling_metadata"].temperature
        for i, end in enumerate(last):
            kept = record.features.setdefault(names[i], {})
            kept.update({int(positions[row]): states[row].clone() for row in range(starts[i], end + 1)})
        at = [int(positions[end]) for end in last]
        found = propose(*args, **kwargs)
        spreads = drafter._last_draft_probs
        for i, tokens in enumerate(found if isinstance(found, list) else found.tolist()):
            temperature = 0.0 if temperatures is None else float(temperatures[i])
            spread = None if spreads is None else spreads[i][: len(tokens)].clone()
            record.add(Draft(names[i], at[i] + 2, tokens, spread, temperature))
        return found

    drafter.propose = recording


def _by_speculator(runner: Any, record: Record) -> None:
    """Runner V2 has the verified tokens beside the drafter."""
    states, speculator, propose = runner.req_states, runner.speculator, runner.speculator.propose

    def recording(input_batch: Any, attn_metadata: Any, slots: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = propose(input_batch, attn_metadata, slots, hidden, *args, **kwargs)
        held = torch.cat(args[0], dim=-1) if args[0] else hidden
        if kwargs.get("dummy_run") or kwargs.get("is_profile"):
            return found
        num_sampled, num_rejected, temperature = args[1], args[2], args[5]
        starts = input_batch.query_start_loc.tolist()
        for row, slot in enumerate(input_batch.idx_mapping.tolist()):
            name = input_batch.req_ids[row]
            kept = record.features.setdefault(name, {})
            for i in range(starts[row], starts[row + 1] - int(num_rejected[row])):
                kept[int(input_batch.positions[i])] = held[i].clone()
            if num_sampled[row] > 0:  # else more of its prompt is to come
                length = int(states.total_len.gpu[slot])
                record.texts[name] = states.all_token_ids.gpu[slot, :length].tolist()
                tokens = found[row, : kwargs.get("num_speculative_tokens")].tolist()
                if not tokens:  # vLLM 0.33 drafts nothing in a step after which no request goes on
                    continue
                spread, heat = None, float(temperature[slot])
                if speculator.draft_logits is not None and heat > 0:
                    spread = (speculator.draft_logits[slot, : len(tokens)].float() / heat).softmax(-1)
                record.add(Draft(name, length, tokens, spread, heat, _confidence(speculator, row, len(tokens))))
                _hold_watermark(speculator, row, record, name, tokens)
        return found

    speculator.propose = recording


def _confidence(speculator: Any, row: int, length: int) -> tuple[Tensor, float, Tensor] | None:
    """Of the draft in this row of the batch, where verification is adaptive."""
    estimator = speculator.acceptance_estimator
    if estimator is None:
        return None
    confidence = speculator.draft_token_confidence_probs[row, :length].clone()
    return confidence, float(estimator.slope), estimator.intercepts[:length].clone()


def _hold_watermark(speculator: Any, row: int, record: Record, name: str, tokens: list[int]) -> None:
    """After a draft, its watermark goes on from the newest tokens of this request, drafted ones included."""
    if speculator.draft_watermarker is None:
        return
    context = watermark_contexts(speculator.draft_watermarker)[row].tolist()
    newest = [*record.texts[name], *tokens][-len(context) :]
    if context != newest:
        record.wrong.append(f"request {name}: the watermark goes on from {context}, not {newest}")


def _by_scheduler(llm: Any, record: Record) -> None:
    """Workers elsewhere: what they hand to the scheduler of runner V1."""
    _keep_texts(llm, record)
    requests = llm.llm_engine.engine_core.engine_core.scheduler.requests

    def add(name: str, text: list[int], tokens: list[int], _row: int) -> None:
        record.add(Draft(name, len(text), tokens, None, requests[name].sampling_params.temperature))

    watch_drafts(llm, add)
