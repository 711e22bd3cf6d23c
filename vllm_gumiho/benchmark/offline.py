"""Offline cells: ``LLM.generate`` in batches, in an `engines.worker`.

Requests are those that ``vllm bench serve`` would make of the same arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterator
from typing import Any

from vllm_gumiho.benchmark.arguments import parse_engine_args, parse_request_args
from vllm_gumiho.benchmark.grid import Grid, Variant
from vllm_gumiho.engines.counters import acceptance, read_counts
from vllm_gumiho.engines.process import Worker
from vllm_gumiho.engines.stream import Stream
from vllm_gumiho.engines.worker import engine_facts
from vllm_gumiho.env import ONE_PROCESS, SCOPES

PARTS = {"forward": "verify", "postprocess": "verify", "sample": "verify", "draft": "draft"}
WARM_TOKENS = 8


def run(grid: Grid, variant: Variant, wanted: list[int]) -> Iterator[dict[str, Any]]:
    """Cells of one engine as they finish, for the wanted concurrencies.  Raises: EngineError when the engine fails."""
    environment = {ONE_PROCESS.name: "0", SCOPES.name: "1"}
    job = {"engine_args": grid.engine_argv(variant), "interpreter": grid.interpreter}
    with Worker(__name__, job, f"{variant.label}: the engine", environment=environment) as engine:
        engine.ask("warm", request_args=grid.request_argv(wanted[0]))
        for concurrency in wanted:
            yield engine.ask(
                "cell",
                request_args=grid.request_argv(concurrency),
                concurrency=concurrency,
                length=variant.length,
                profile_steps=grid.profile_steps if engine.started["model_runner"] == "V1" else 0,
            )


def start(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """An engine for the arguments of ``vllm serve``."""
    from vllm import LLM

    llm = LLM.from_engine_args(parse_engine_args(job["engine_args"]))
    return llm, engine_facts(llm)


def warm(llm: Any, request_args: list[str]) -> None:
    """A short request, which pays for what is made on first use."""
    asked = parse_request_args(request_args)
    _generate(llm, _requests(llm, asked)[:1], asked, 1, WARM_TOKENS)


def cell(llm: Any, request_args: list[str], concurrency: int, length: int | str, profile_steps: int) -> dict[str, Any]:
    """Figures of one cell; times of a step's parts where ``profile_steps`` are asked for."""
    asked = parse_request_args(request_args)
    requests = _requests(llm, asked)
    done = measure(llm, requests, asked, concurrency, length)
    steps = step_times(llm, requests, concurrency, profile_steps) if profile_steps else None
    return {"concurrency": concurrency, "model_runner": engine_facts(llm)["model_runner"], **done, "step_ms": steps}


def measure(
    llm: Any, requests: list[Any], asked: argparse.Namespace, concurrency: int, length: int | str
) -> dict[str, Any]:
    """Figures of one cell: tokens/s, percentiles in ms over requests, acceptance and the answers' digests."""
    import numpy as np

    before = read_counts(llm.get_metrics())
    start = time.perf_counter()
    outputs = _generate(llm, requests, asked, concurrency)
    seconds = time.perf_counter() - start
    counts = read_counts(llm.get_metrics()) - before
    tokens = [len(output.outputs[0].token_ids) for output in outputs]
    stats = [output.metrics for output in outputs]
    first = [1000 * one.first_token_latency for one in stats]
    later = [
        1000 * (one.last_token_ts - one.first_token_ts) / (count - 1)
        for one, count in zip(stats, tokens, strict=True)
        if count > 1
    ]

    def percentiles(values: list[float]) -> dict[str, float | None]:
        return {f"p{p}": float(np.percentile(values, p)) if values else None for p in (50, 95)}

    return {
        "requests": len(outputs),
        "output_tokens": sum(tokens),
        "seconds": seconds,
        "output_tokens_per_s": sum(tokens) / seconds,
        "tpot_ms": percentiles(later),
        "ttft_ms": percentiles(first),
        "drafts": counts.drafts,
        "draft_tokens": counts.draft_tokens,
        "accepted_tokens": counts.accepted_tokens,
        **acceptance(counts, length),
        "answers": [_digest(output.outputs[0].token_ids) for output in outputs],
    }


def step_times(llm: Any, requests: list[Any], concurrency: int, steps: int) -> dict[str, float] | None:
    """Milliseconds of a decoding step by part, from the scopes vLLM's model runner V1 marks for profilers.

    verify: the target's pass, its LM head and the (rejection) sampler.  draft: the proposer.  rest: all else of the
    step, scheduling included.  On a GPU the parts are kernel time.  None when every request ended before.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    engine, stream = llm.llm_engine, Stream(llm.llm_engine)
    sampling = SamplingParams(temperature=0, max_tokens=512, ignore_eos=True, detokenize=False)
    for number, request in enumerate(requests[:concurrency]):
        stream.send(number, _prompt(request), sampling)
    started: set[int] = set()
    while len(started) < min(concurrency, len(requests)) and engine.has_unfinished_requests():
        started |= {number for number, _ in stream.step()}
    accelerator = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if accelerator else [])]
    begin, taken = time.perf_counter(), 0
    with profile(activities=activities, acc_events=True) as profiled:
        while taken < steps and engine.has_unfinished_requests():
            stream.step()
            taken += 1
        total = 1000 * (time.perf_counter() - begin)
    stream.abort()
    stream.drain()
    if not taken:
        return None
    parts = dict.fromkeys(("verify", "draft"), 0.0)
    for event in profiled.key_averages():
        part = PARTS.get(event.key.removeprefix("gpu_model_runner: "))
        if part is not None and event.key.startswith("gpu_model_runner: "):
            parts[part] += (event.device_time_total if accelerator else event.cpu_time_total) / 1000
    return {name: ms / taken for name, ms in parts.items()} | {"rest": max(0.0, total - sum(parts.values())) / taken}


def _requests(llm: Any, asked: argparse.Namespace) -> list[Any]:
    from vllm.benchmarks.datasets import get_samples

    requests: list[Any] = get_samples(asked, llm.get_tokenizer())
    other = next((r for r in requests if not isinstance(r.prompt, str) or r.multi_modal_data), None)
    if other is not None:
        raise ValueError(f"dataset {asked.dataset_name}: offline runs take text prompts only; run --mode server")
    return requests


def _generate(llm: Any, requests: list[Any], asked: Any, concurrency: int, most: int | None = None) -> list[Any]:
    """Outputs of the requests, ``concurrency`` of them to a call of ``LLM.generate``."""
    from vllm import SamplingParams

    names = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
    common = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    outputs: list[Any] = []
    for at in range(0, len(requests), concurrency):
        batch = requests[at : at + concurrency]
        sampling = [
            SamplingParams(**common, max_tokens=most or request.expected_output_len, ignore_eos=asked.ignore_eos)
            for request in batch
        ]
        outputs += llm.generate([_prompt(request) for request in batch], sampling, use_tqdm=False)
    return outputs


def _prompt(request: Any) -> dict[str, str]:
    return {"prompt": request.prompt}


def _digest(tokens: Any) -> str:
    return hashlib.sha256(" ".join(map(str, tokens)).encode()).hexdigest()[:12]


TASKS = {"warm": warm, "cell": cell}
