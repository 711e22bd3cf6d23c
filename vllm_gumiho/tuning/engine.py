"""A measuring engine: laid out in processes like a server's, or in one process with a server's threads."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from vllm_gumiho.engines.process import LIMIT_S, Worker
from vllm_gumiho.env import ONE_PROCESS
from vllm_gumiho.errors import TuningError


class MeasuringEngine(Worker):
    """A worker that times steps and counts acceptance; see `tasks` for what it can be asked.

    settings: arguments of `vllm.LLM`.  limit_s: from its start to its last answer.  serving: laid out in processes like
    a server's engine; without, in one process, whose draft length can be changed, but with a server's threads.

    Raises: EngineError, with the engine's reason, when it fails or takes too long.
    """

    def __init__(self, settings: dict[str, Any], limit_s: float = LIMIT_S, serving: bool = False):
        environment = {ONE_PROCESS.name: str(int(serving))}
        if not serving and settings.get("tensor_parallel_size", 1) == 1:
            environment |= worker_threads()
        super().__init__(
            "vllm_gumiho.tuning.tasks", {"llm": settings}, "the measuring engine", limit_s, environment=environment
        )
        self.settings, self.serving = settings, serving


def worker_threads() -> dict[str, str]:
    """OpenMP's variables that vLLM gives the one worker of a server on a CPU, none elsewhere.

    An engine in one process goes without them: it would use the core that a server keeps for its scheduler.

    Raises: TuningError where vLLM gives none.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    try:
        from vllm.config import ParallelConfig
        from vllm.utils.ompmultiprocessing import OMPProcessManager

        manager = OMPProcessManager(SimpleNamespace(parallel_config=ParallelConfig(), kv_transfer_config=None))
        before = dict(os.environ)
        with manager.configure_omp_envs(0, 0):
            return {name: value for name, value in os.environ.items() if before.get(name) != value}
    except (ImportError, AssertionError, AttributeError, TypeError, RuntimeError) as error:
        raise TuningError(f"vLLM gives no threads to a worker here: {error or type(error).__name__}") from error
