"""Offline cells: ``LLM.generate`` in batches, in an engine process of its own.

``python -m vllm_gumiho.benchmark.offline JOB.json RESULT.jsonl``, the form that `evaluation.judge.engine_lines` runs.
Requests are those that ``vllm bench serve`` would make of the same arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_gumiho.benchmark.grid import Grid, Variant
from vllm_gumiho.evaluation.judge import engine_lines
from vllm_gumiho.evaluation.metrics import acceptance, read_counts

SCOPES = {"forward": "verify", "postprocess": "verify", "sample": "verify", "draft": "draft"}
SCOPES_VARIABLE = "VLLM_CUSTOM_SCOPES_FOR_PROFILING"
WARM_TOKENS = 8


def run(grid: Grid, variant: Variant, wanted: list[int]) -> Iterator[dict[str, Any]]:
    """Cells of one engine as they finish, for the wanted concurrencies.  Raises: EvalError when the engine fails."""
    job = {
        "engine_args": grid.engine_argv(variant),
        "cells": [{"concurrency": c, "request_args": grid.request_argv(c)} for c in wanted],
        "length": variant.length, "profile_steps": grid.profile_steps, "interpreter": grid.interpreter,
    }  # fmt: skip
    yield from engine_lines(job, Console(quiet=True), variant.label, "vllm_gumiho.benchmark.offline")


def parse_engine_args(argv: list[str]) -> Any:
    """vLLM's ``EngineArgs`` for the arguments of ``vllm serve``, the target first.  Raises: SystemExit as argparse."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return EngineArgs.from_cli_args(parser.parse_args(["--model", *argv]))


def parse_request_args(argv: list[str]) -> argparse.Namespace:
    """Arguments of ``vllm bench serve``, general lengths set for each dataset as that command does."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    args = parser.parse_args(argv)
    for name in list(vars(args)):
        if name.endswith("_output_len") and args.output_len is not None:
            setattr(args, name, args.output_len)
    if args.input_len is not None:
        args.random_input_len = args.input_len
    args.ignore_eos = args.ignore_eos or args.dataset_name == "random"
    return args


def run_engine(job: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Run every cell of the job: a line for the engine, then one a cell."""
    from vllm import LLM

    llm = LLM.from_engine_args(parse_engine_args(job["engine_args"]))
    config = llm.llm_engine.vllm_config
    runner = "V2" if config.use_v2_model_runner else "V1"
    emit({"kind": "engine", "model_runner": runner, "dtype": str(config.model_config.dtype).removeprefix("torch.")})
    warm = False
    for cell in job["cells"]:
        asked = parse_request_args(cell["request_args"])
        requests = _requests(llm, asked)
        if not warm:
            _generate(llm, [requests[0]], asked, 1, WARM_TOKENS)
            warm = True
        done = measure(llm, requests, asked, cell["concurrency"], job["length"])
        done["step_ms"] = None
        if job["profile_steps"] and runner == "V1":
            done["step_ms"] = step_times(llm, requests, cell["concurrency"], job["profile_steps"])
        emit({"kind": "cell", "concurrency": cell["concurrency"], "model_runner": runner, **done})
    llm.llm_engine.engine_core.shutdown()


def measure(llm: Any, requests: list[Any], asked: argparse.Namespace, concurrency: int, length: int) -> dict[str, Any]:
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
        "requests": len(outputs), "output_tokens": sum(tokens), "seconds": seconds,
        "output_tokens_per_s": sum(tokens) / seconds, "tpot_ms": percentiles(later), "ttft_ms": percentiles(first),
        "drafts": counts.drafts, "accepted_tokens": counts.accepted_tokens, **acceptance(counts, length),
        "answers": [_digest(output.outputs[0].token_ids) for output in outputs],
    }  # fmt: skip


def step_times(llm: Any, requests: list[Any], concurrency: int, steps: int) -> dict[str, float] | None:
    """Milliseconds of a decoding step by part, from the scopes vLLM's model runner V1 marks for profilers.

    verify: the target's pass, its LM head and the (rejection) sampler.  draft: the proposer.  rest: all else of the
    step, scheduling included.  On a GPU the parts are kernel time.  None when every request ended before.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    engine = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=512, ignore_eos=True, detokenize=False)
    names = [f"step-{concurrency}-{i}-{time.monotonic_ns()}" for i in range(concurrency)]
    for name, request in zip(names, requests, strict=False):
        engine.add_request(name, _prompt(request), sampling)
    started: set[str] = set()
    while len(started) < min(concurrency, len(requests)) and engine.has_unfinished_requests():
        started |= {output.request_id for output in engine.step()}
    accelerator = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if accelerator else [])]
    begin, taken = time.perf_counter(), 0
    with profile(activities=activities, acc_events=True) as profiled:
        while taken < steps and engine.has_unfinished_requests():
            engine.step()
            taken += 1
        total = 1000 * (time.perf_counter() - begin)
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    if not taken:
        return None
    parts = dict.fromkeys(("verify", "draft"), 0.0)
    for event in profiled.key_averages():
        part = SCOPES.get(event.key.removeprefix("gpu_model_runner: "))
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
    import hashlib

    return hashlib.sha256(" ".join(map(str, tokens)).encode()).hexdigest()[:12]


def main() -> None:
    """Run the job of the first argument, write lines to the second; exit code 1 after an error."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.update({"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", SCOPES_VARIABLE: "1"})
    job = json.loads(Path(sys.argv[1]).read_text())
    with Path(sys.argv[2]).open("a") as lines:

        def emit(line: dict[str, Any]) -> None:
            lines.write(json.dumps(line) + "\n")
            lines.flush()

        try:
            if job["interpreter"]:
                from vllm_gumiho.benchmark.interpreter import prepare

                prepare()
            run_engine(job, emit)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            emit({"kind": "error", "message": f"{type(error).__name__}: {error}"})
            raise SystemExit(1) from None


if __name__ == "__main__":
    main()
