"""What a worker of `tree-gate` does: times of the target's passes over some rows of each request, none of it drafted.

vLLM's own dummy runs and clock, by which its adaptive verification learns what steps cost: captured graphs are
replayed over a context that is made up.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def pass_ms(llm: Any, batch: int, rows: int, context: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds of a pass over ``batch`` times ``rows`` rows behind ``context`` tokens each.

    forward: of the layers.  logits: of the LM head over all rows.  full_graph: whether one CUDA graph was all of the
    forward, each time.
    """
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert runner.decode_query_len == rows

    def run() -> torch.Tensor:
        hidden: torch.Tensor = runner._dummy_run(batch * rows, uniform_decode=True, context_len=context)[0]
        return hidden

    hidden = run()[: batch * rows].clone()
    logits = _median_ms(lambda: runner.model.compute_logits(hidden), repeats, hidden.is_cuda)
    if not hidden.is_cuda:
        return {"forward": _median_ms(run, repeats, False), "logits": logits, "full_graph": False}
    for _ in range(3):
        run()
    with runner.step_timing.collect() as samples:
        for _ in range(repeats):
            run()
    return {
        "forward": statistics.median(one.forward_ms for one in samples),
        "logits": logits,
        "full_graph": all(one.full_cudagraph for one in samples),
    }


def _median_ms(run: Callable[[], Any], repeats: int, on_gpu: bool) -> float:
    with torch.inference_mode():
        run()
        if not on_gpu:
            found = []
            for _ in range(repeats):
                begin = time.perf_counter()
                run()
                found.append(1000 * (time.perf_counter() - begin))
            return statistics.median(found)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


TASKS = {"pass": pass_ms}
