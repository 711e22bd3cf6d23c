"""The front end of a measuring engine: starts its process, asks it, and ends it whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_gumiho.tuning import TuningError


class MeasuringEngine:
    """A context in which an engine runs in a process of its own; see `worker` for what it can be asked.

    settings: arguments of `vllm.LLM`.  limit_s: from its start to its last answer.  serving: laid out in processes like
    a server's engine; without, in one process, whose draft length can be changed, but with a server's threads.

    Raises: TuningError, with the engine's reason, when it fails or takes too long.
    """

    def __init__(self, settings: dict[str, Any], limit_s: float = 4 * 3600.0, serving: bool = False):
        self.settings = settings
        self.limit_s = limit_s
        self.serving = serving
        self.started: dict[str, Any] = {}
        self._read = 0

    def __enter__(self) -> MeasuringEngine:
        self._deadline = time.monotonic() + self.limit_s
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-gumiho-tune-")
        folder = Path(self._folder.name)
        (folder / "llm.json").write_text(json.dumps(self.settings))
        self._replies, self._log = folder / "replies", folder / "log"
        self._replies.touch()
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(self.serving))
        if not self.serving and self.settings.get("tensor_parallel_size", 1) == 1:
            environment |= worker_threads()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_gumiho.tuning.worker", str(folder)],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip
        try:
            self.started = self._reply()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def ask(self, do: str, **request: Any) -> Any:
        """The engine's answer to one request."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> Any:
        while True:
            ended = self._process.poll() is not None
            lines = self._replies.read_text().split("\n")[:-1]
            if len(lines) > self._read:
                self._read += 1
                answer = json.loads(lines[self._read - 1])
                if isinstance(answer, dict) and "error" in answer:
                    raise TuningError(f"the measuring engine failed: {answer['error']}")
                return answer
            if ended:
                last = (self._log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
                code = self._process.returncode
                raise TuningError(f"the measuring engine failed: exit code {code}, last line: {last}")
            if time.monotonic() > self._deadline:
                raise TuningError(
                    f"measuring took more than {self.limit_s:.0f} s and was stopped; measure less, or later"
                )
            time.sleep(0.02)

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._folder.cleanup()


def worker_threads() -> dict[str, str]:
    """OpenMP's variables that vLLM gives the one worker of a server on a CPU, none elsewhere.

    An engine in one process goes without them: it would use the core that a server keeps for its scheduler.
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
