"""A process that works on request: ``python -m vllm_gumiho.engines.worker``, the other end of `process.Worker`.

JSON lines on standard input: first the job, then requests ``{"do": name, ...}``.  A JSON line on standard output for
each: ``{"result": ...}``, for the job the facts of what was started, or ``{"error": reason}``.  Whatever else writes to
standard output goes to standard error.

A job names a module of ``tasks``: its `TASKS` take what was started and the rest of a request.  A module may have a
``start(job)`` of its own; else `start_engine` starts a `vllm.LLM`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

_WATCH_S = 1.0


def start_engine(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """An engine for ``job["llm"]``, the arguments of `vllm.LLM`, and the facts of it."""
    from vllm import LLM

    # An engine collects garbage six times as it starts, each time through all that is imported, if not set apart.
    gc.freeze()
    llm = LLM(**job["llm"])
    return llm, engine_facts(llm)


def kv_cache_of(gibibytes: float) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for a KV cache of that size on a GPU that others use too.

    vLLM then does not measure what is free, which fails where another engine starts or ends meanwhile.
    """
    return {"kv_cache_memory_bytes": int(gibibytes * 2**30), "gpu_memory_utilization": 0.02}


def engine_facts(llm: Any) -> dict[str, Any]:
    """vLLM's version, device, model runner, dtype, and what drafts how many tokens."""
    import vllm
    from vllm.platforms import current_platform

    config = llm.llm_engine.vllm_config
    speculative = config.speculative_config
    draft = getattr(getattr(speculative, "draft_model_config", None), "hf_config", None)
    return {
        "vllm": vllm.__version__,
        "device": current_platform.get_device_name(),
        "model_runner": "V2" if config.use_v2_model_runner else "V1",
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "draft_architecture": next(iter(getattr(draft, "architectures", None) or ()), None),
        "draft_length": speculative.num_speculative_tokens if speculative else 0,
    }


def end_with(parent: int) -> None:
    """End this process and its children when its parent has ended, killed perhaps, in the midst of a request."""
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Work until the input ends; exit code 1 where nothing could be started."""
    # A session of its own (see `process.spawn`), so that the group is this process and what it starts.
    if os.getpid() == os.getpgrp():
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**line: Any) -> None:
        print(json.dumps(line), file=answers, flush=True)

    def failed(error: BaseException) -> None:
        traceback.print_exc()
        say(error=f"{type(error).__name__}: {error}")

    try:
        job = json.loads(sys.stdin.readline())
        if job.get("interpreter"):
            from vllm_gumiho.engines.interpreter import prepare

            prepare()
        tasks = importlib.import_module(job["tasks"])
        started, facts = getattr(tasks, "start", start_engine)(job)
    except (Exception, SystemExit) as error:
        failed(error)
        raise SystemExit(1) from None
    say(result=facts)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            say(result=tasks.TASKS[request.pop("do")](started, **request))
        except (Exception, SystemExit) as error:
            failed(error)
    if hasattr(started, "llm_engine"):
        started.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
