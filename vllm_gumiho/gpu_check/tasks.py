"""What a worker of `gpu-check` does: kernels on their own, or an engine whose drafts are recorded."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vllm_gumiho.engines.record import record_drafts


def start(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """An engine for ``job["llm"]``; without one, nothing but this process."""
    if "llm" not in job:
        return None, {}
    from vllm_gumiho.engines.worker import start_engine

    llm, facts = start_engine(job)
    llm.recorded = record_drafts(llm) if job.get("record") else []
    return llm, facts


def generate(llm: Any, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Greedy texts of prompts at once, seconds, drafts accepted at each position, and what was recorded meanwhile."""
    from vllm import SamplingParams

    from vllm_gumiho.engines.counters import read_counts

    llm.recorded.clear()
    before, begin = read_counts(llm.get_metrics()), time.perf_counter()
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": one} for one in prompts], sampling, use_tqdm=False)
    seconds, counts = time.perf_counter() - begin, read_counts(llm.get_metrics()) - before
    return {
        "texts": [list(output.outputs[0].token_ids) for output in outputs],
        "seconds": seconds,
        "accepted": list(counts.accepted_per_position),
        "drafts": list(llm.recorded),
    }


def heads(_: Any, hidden: int, counts: list[int], batches: list[int], device: str, launches: int) -> dict[str, Any]:
    """Every number of heads at every batch, by every path of the kernel, beside work on another stream.

    Launched one by one and, on a GPU, replayed from a CUDA graph: within the tolerance, the same bits each time, and no
    wait given up.
    """
    from vllm_gumiho.kernels.bench.cases import HeadsCase
    from vllm_gumiho.kernels.parallel_heads import (
        GAVE_UP,
        HEAD_STAGES,
        SPACING,
        HeadsPath,
        choose_path,
        new_counters,
        parallel_heads,
        parallel_heads_reference,
    )

    dtype = torch.bfloat16
    inputs = HeadsCase(hidden, max(batches), max(counts), dtype, device).inputs(0)
    exact = parallel_heads_reference(inputs.m.float(), inputs.weights)
    best, _reason = choose_path(inputs.m[:1], inputs.weights)
    paths = [HeadsPath.STAGES] + [HeadsPath.FUSED] * (best is HeadsPath.FUSED or device == "cpu")
    counters, wrong, checked = new_counters(exact.device), [], 0
    for path in paths:
        for count in counts:
            for batch in batches:
                run: Callable[[], Tensor] = partial(
                    parallel_heads, inputs.m[:batch], inputs.weights.take(count), path=path, counters=counters
                )
                replay = _captured(run) if device != "cpu" else run
                with _busy(device):
                    found = [one() for one in [run, replay] * launches]
                right = exact[:count, :batch]
                allowed = HEAD_STAGES * SPACING[dtype] * right.abs().max().item()
                error = (found[0].float() - right).abs().max().item()
                same = all(torch.equal(z, found[0]) for z in found)
                checked += 1
                if not error <= allowed or not same or counters[0] or counters[GAVE_UP]:
                    wrong.append(
                        f"{count} heads at batch {batch} by {path.value}: off by {error:.2e}, same bits {same}"
                    )
    return {"checked": checked, "paths": [path.value for path in paths], "wrong": wrong}


def argmax(_: Any, hidden: int, vocab: int, rows: list[int], device: str) -> dict[str, Any]:
    """Tokens of these numbers of rows against float32 logits, by the kernel or, of many rows, the library."""
    from vllm_gumiho.kernels.bench.cases import ArgmaxCase, ArgmaxInputs
    from vllm_gumiho.kernels.lm_head_argmax import launches, lm_head_argmax

    case = ArgmaxCase(hidden, max(rows), vocab, torch.bfloat16, device)
    inputs, wrong, before = case.inputs(0), [], launches.copy()
    for count in rows:
        some = ArgmaxInputs(inputs.rows[:count], inputs.weight)
        with _busy(device):
            found = lm_head_argmax(*some)
        error, allowed = case.check("", found, some)
        if not error <= allowed:
            wrong.append(f"{count} rows: {error:.2e} below the best logit")
    return {"checked": len(rows), "ways": dict(launches - before), "wrong": wrong}


def times(
    _: Any, hidden: int, vocab: int, counts: list[int], batches: list[int], rows: list[int], device: str
) -> list[dict[str, Any]]:
    """Microseconds of the kernel and of the library for every shape that the kernels take."""
    from vllm_gumiho.drafters.kernel_timing import graph_timer
    from vllm_gumiho.kernels.bench.cases import ArgmaxCase, HeadsCase
    from vllm_gumiho.kernels.lm_head_argmax import lm_head_argmax
    from vllm_gumiho.kernels.parallel_heads import HeadsPath, new_counters, parallel_heads

    timer, found = (_clock if device == "cpu" else graph_timer), []
    inputs = HeadsCase(hidden, max(batches), max(counts), torch.bfloat16, device).inputs(0)
    counters = new_counters(inputs.m.device)
    for count in counts:
        for batch in batches:
            run = partial(parallel_heads, inputs.m[:batch], inputs.weights.take(count), counters=counters)
            kernel, library = timer(run, partial(run, path=HeadsPath.BATCHED))
            found.append({"what": f"{count} heads at batch {batch}", "kernel_us": kernel, "library_us": library})
    del inputs
    scanned = ArgmaxCase(hidden, max(rows), vocab, torch.bfloat16, device).inputs(0)
    for count in rows:
        scan = partial(lm_head_argmax, scanned.rows[:count], scanned.weight)
        kernel, library = timer(scan, partial(scan, kernel=False))
        found.append({"what": f"argmax of {count} rows", "kernel_us": kernel, "library_us": library})
    return found


def _clock(kernel: Any, library: Any) -> tuple[float, float]:
    """Seconds of one call each, as microseconds: of no use but to go through the code on a CPU."""
    found = []
    for run in (kernel, library):
        begin = time.perf_counter()
        run()
        found.append(1e6 * (time.perf_counter() - begin))
    return found[0], found[1]


def _captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Replays a CUDA graph of one call, over a result that was wiped."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = run()

    def replay() -> Tensor:
        z.zero_()
        graph.replay()
        return z.clone()

    return replay


@contextlib.contextmanager
def _busy(device: str) -> Iterator[None]:
    """Matrix products on another stream meanwhile, which take processors from the kernel's programs."""
    if device == "cpu":
        yield
        return
    side, a = torch.cuda.Stream(), torch.randn(4096, 4096, dtype=torch.bfloat16, device=device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(200):
            a @ a
    yield
    torch.cuda.synchronize()


TASKS = {"generate": generate, "heads": heads, "argmax": argmax, "times": times}
