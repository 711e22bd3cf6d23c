"""Runs engine cases in a process of its own: ``python engine_main.py JOB.json RESULT.json``.

A job is ``{"runner": "v1" | "v2", "cases": {name: {"llm": {...}, "steps": [{"do": kind, ...}]}}}``; the kinds are the
keys of `STEPS`.  A case's result has the engine's facts and one entry a step: what the step returned, or its error,
and by how much vLLM's own counters grew in it; and the process's attempts to reach a network.  The V2 runner needs
Triton's interpreter, which must be chosen before Triton is imported: hence the process.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import draft_records
import moa_faults
import walk_faults
from config_main import watch_network
from gpu_like import adaptive, operators, replay, sleep, traced
from recording import record_drafts

COUNTERS = {
    "vllm:spec_decode_num_drafts": "drafts", "vllm:spec_decode_num_draft_tokens": "drafted",
    "vllm:spec_decode_num_accepted_tokens": "accepted", "vllm:num_preemptions": "preemptions",
    "vllm:prefix_cache_hits": "prefix_hits", "vllm:prompt_tokens": "prompt_tokens",
    "vllm:generation_tokens": "generated",
}  # fmt: skip


def prepare(runner: str) -> None:
    """Set this process up for a model runner; before vLLM is imported."""
    os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="INFO")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if runner == "v2":
        from vllm_gumiho.engines import interpreter

        interpreter.prepare()
        mask_by_torch()


def mask_by_torch() -> None:
    """Top-k and top-p by their torch form, which the CPU build takes: their kernel does not run in the interpreter."""
    from vllm.v1.sample.ops import topk_topp_sampler

    def mask(logits: Any, k: Any, p: Any, **rest: Any) -> Any:
        return topk_topp_sampler.apply_top_k_top_p_pytorch(logits, k, p)

    topk_topp_sampler.apply_top_k_top_p = mask


def counters(llm: Any) -> dict[str, float]:
    totals = dict.fromkeys(COUNTERS.values(), 0)
    for metric in llm.get_metrics():
        if metric.name in COUNTERS:
            totals[COUNTERS[metric.name]] += metric.value
    return totals


def accepted_per_position(llm: Any) -> list[int]:
    found = (m for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens_per_pos")
    return next((list(metric.values) for metric in found), [])


def launches() -> dict[str, list[str]]:
    """Which kernels have run in this process."""
    from vllm_gumiho.kernels import lm_head_argmax, parallel_heads

    heads = sorted(path.value for path in parallel_heads.launches)
    return {"heads": heads, "argmax": sorted(lm_head_argmax.launches)}


def sampling_params(fields: dict) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    fields = dict(fields)
    if "structured_outputs" in fields:
        fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): value for token, value in fields["logit_bias"].items()}
    return SamplingParams(**fields)


def as_prompts(prompts: list) -> list:
    return [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in prompts]


def plain(output: Any) -> dict:
    """A request's output as JSON: every completion's tokens, text, reasons and logprobs."""

    def values(entry: dict | None) -> dict | None:
        return None if entry is None else {str(token): logprob.logprob for token, logprob in entry.items()}

    return {
        "tokens": [list(o.token_ids) for o in output.outputs],
        "texts": [o.text for o in output.outputs],
        "finish": [o.finish_reason for o in output.outputs],
        "stop": [o.stop_reason for o in output.outputs],
        "logprobs": [o.logprobs and [values(entry) for entry in o.logprobs] for o in output.outputs],
        "prompt_logprobs": output.prompt_logprobs and [values(entry) for entry in output.prompt_logprobs],
    }


def generate(llm: Any, step: dict) -> list[dict]:
    from vllm.lora.request import LoRARequest

    sampling = step["sampling"]
    parameters = [sampling_params(s) for s in sampling] if isinstance(sampling, list) else sampling_params(sampling)
    numbers = {folder: 1 + i for i, folder in enumerate(sorted({folder for folder in step.get("lora", []) if folder}))}
    lora = [folder and LoRARequest(Path(folder).name, numbers[folder], folder) for folder in step.get("lora", [])]
    outputs = llm.generate(as_prompts(step["prompts"]), parameters, use_tqdm=False, lora_request=lora or None)
    return [plain(output) for output in outputs]


def traffic(llm: Any, step: dict) -> dict:
    """Engine steps in which request i joins at step ``join[i]`` and is aborted once it has ``abort[i]`` tokens."""
    engine = llm.llm_engine
    waiting = dict(enumerate(step["prompts"]))
    seen: dict[int, dict] = {}
    aborted: list[int] = []
    now = 0
    while waiting or engine.has_unfinished_requests():
        for i in [i for i in waiting if step["join"][i] <= now]:
            (prompt,) = as_prompts([waiting.pop(i)])
            engine.add_request(str(i), prompt, sampling_params(step["sampling"]))
        for output in engine.step():
            i = int(output.request_id)
            seen[i] = plain(output)
            limit = step["abort"][i]
            if limit is not None and len(output.outputs[0].token_ids) >= limit and i not in aborted:
                engine.abort_request([str(i)])
                aborted.append(i)
        now += 1
    unused = engine.engine_core.engine_core.scheduler.kv_cache_manager.usage
    return {"outputs": [seen[i] for i in range(len(step["prompts"]))], "aborted": aborted, "cache_usage": unused}


def embed(llm: Any, step: dict) -> list[list[float]]:
    return [output.outputs.embedding for output in llm.embed(as_prompts(step["prompts"]), use_tqdm=False)]


def reach(llm: Any, step: dict) -> int:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", step["port"]))


def profile(llm: Any, step: dict) -> None:
    """The run by which a GPU's start measures its memory; a CPU's start has none."""
    llm.llm_engine.model_executor.driver_worker.worker.model_runner.profile_run()


STEPS = {
    "generate": generate,
    "traffic": traffic,
    "embed": embed,
    "reach": reach,
    "profile": profile,
    "sleep": lambda llm, _: sleep.sleep_and_wake(llm),
    "traced": lambda llm, _: traced.functionalized(llm),
    "calls": lambda llm, _: llm.collective_rpc("gpu_like_calls"),
}


def run_step(llm: Any, step: dict) -> dict:
    before, started = counters(llm), time.monotonic()
    try:
        result: dict = {"result": STEPS[step["do"]](llm, step)}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
        traceback.print_exc()
    seconds, after = time.monotonic() - started, counters(llm)
    return result | {"seconds": seconds, "counts": {name: after[name] - before[name] for name in after}}


def keep_async_scheduling() -> None:
    """Take async_scheduling as it was asked for: vLLM's CPU platform turns it off, though its runner can do it."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def keep(cls, vllm_config) -> None:
        asked = vllm_config.scheduler_config.async_scheduling
        update(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked

    CpuPlatform.check_and_update_config = classmethod(keep)


def loose_tensors(model: Any) -> list[str]:
    """Tensors that our modules of a draft model hold as neither parameter nor buffer: vLLM's sleep loses them."""
    import torch

    return sorted(
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        if type(module).__module__.startswith("vllm_gumiho.")
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    )


def accept_too_often() -> None:
    """A wrong sampler: drafts pass with their probability over 0.75."""
    from vllm.v1.sample import rejection_sampler

    right = rejection_sampler.generate_uniform_probs
    rejection_sampler.generate_uniform_probs = lambda *args, **kwargs: right(*args, **kwargs) * 0.75


def send_for_what_was_drawn() -> None:
    """Whether a drawn token is verified hangs on the token, which favours some over others."""
    from vllm_gumiho.runners import v1

    v1.chances_of_drawn = lambda probs, tokens, greedy: probs.gather(-1, tokens[:, None])[:, 0]


PLANTS = {
    "sent for what was drawn": send_for_what_was_drawn,
    "accepts too often": accept_too_often,
    "gpu-like": operators.turn_on,
    "adaptive": adaptive.turn_on,
    **moa_faults.FAULTS,
    **walk_faults.FAULTS,
}


@functools.cache
def set_imports_apart() -> None:
    """Keep the collection of garbage off what is imported: each engine makes eight, which take half its time here.

    vLLM sets apart what there is once an engine runs, and undoes it as one ends.
    """
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


def run_case(case: dict, attempts: list[str]) -> dict:
    from vllm import LLM

    if case.get("import_first"):
        import vllm_gumiho  # noqa: F401
    if "plant" in case:
        PLANTS[case["plant"]]()
    if case["llm"].get("async_scheduling"):
        keep_async_scheduling()
    defaults = {
        "dtype": "float32",
        "max_model_len": 256,
        "enforce_eager": True,
        "max_num_seqs": 8,
        "disable_log_stats": False,
    }
    set_imports_apart()
    before = len(attempts)
    llm = LLM(**(defaults | case["llm"]))
    config = llm.llm_engine.vllm_config
    speculative = config.speculative_config
    facts = {
        "runner": "v2" if config.use_v2_model_runner else "v1",
        "async_scheduling": config.scheduler_config.async_scheduling,
        "batches_in_flight": getattr(llm.llm_engine.engine_core.engine_core, "batch_queue_size", None),
        "draft": speculative and getattr(speculative.draft_model_config, "architectures", None),
        "method": speculative and speculative.method,
        "draft_tensor_parallel_size": speculative and speculative.draft_tensor_parallel_size,
        "quantization": config.model_config.quantization,
    }
    runner = draft_records.runner_of(llm)
    facts |= {
        "drafter": type(getattr(runner, "drafter", None) or getattr(runner, "speculator", None)).__name__,
        "model": config.model_config.model,
        "k": speculative and speculative.num_speculative_tokens,
    }
    record = draft_records.attach(llm) if draft_records.drafts_here(llm) and "not compared" not in case else None
    drafts, features = record_drafts(llm) if case.get("record features") else ([], [])
    replays = replay.watch(llm) if case.get("replay") else []
    steps = [run_step(llm, step) for step in case["steps"]]
    facts |= {"accepted per position": accepted_per_position(llm), "launches": launches()}
    draft = getattr(getattr(runner, "drafter", None) or getattr(runner, "speculator", None), "model", None)
    facts["loose tensors"] = [] if draft is None else loose_tensors(draft)
    facts |= {
        "gpu-like": dict(operators.CALLS),
        "most heads": operators.MOST["heads"],
        "replays": replays,
        "verification": dict(adaptive.TOKENS),
    }
    keeps = bool(case.get("keep features"))
    facts["drafts"] = None if record is None else draft_records.compare(llm, record, keeps)
    facts["features"] = draft_records.kept_features(record) if keeps and record is not None else None
    if record is not None and not case.get("record features"):
        drafts += [(text, draft.tokens) for text, draft in record.finished()]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return {"facts": facts, "steps": steps, "drafts": drafts, "draft features": features, "network": attempts[before:]}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    prepare(job["runner"])
    attempts = watch_network()
    results = {}
    for name, case in job["cases"].items():
        try:
            results[name] = run_case(case, attempts)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        # What a case that raised has left, once its traceback is let go.
        gc.collect()
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
