"""Processes of our own: started with a log, asked in JSON lines, ended with all their children whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gumiho.env import engine_environment
from vllm_gumiho.errors import EngineError

if TYPE_CHECKING:
    from typing_extensions import Self

LIMIT_S = 4 * 3600.0
_POLL_S = 0.2


def spawn(command: list[str], log: Path, environment: dict[str, str], asked: bool = False) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own.  asked: with pipes to it and from it, and only errors in the log."""
    pipe = subprocess.PIPE if asked else None
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=pipe or subprocess.DEVNULL,
            stdout=pipe or output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask a process and its children to end, and make them."""
    for number, patience in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def last_words(log: Path) -> str:
    """The last error line of a log, else its last line."""
    text = log.read_text(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no output"]
    errors = [line for line in lines if "Error" in line and "for the root cause" not in line]
    return (errors or lines)[-1][-400:]


class Worker:
    """A context in which a process works on request; see `vllm_gumiho.engines.worker`.

    tasks: the module of what it can be asked.  job: what it is started with, ``llm`` for an engine.  name: in messages.
    limit_s: from its start to its last answer.  environment: beside this process's.  log: a file to keep its log in.
    wait: until it has started; else the first question does.

    Raises: EngineError, with its reason, when it fails or takes too long.
    """

    def __init__(
        self,
        tasks: str,
        job: dict[str, Any],
        name: str = "the engine",
        limit_s: float = LIMIT_S,
        environment: dict[str, str] | None = None,
        log: Path | None = None,
        wait: bool = True,
    ):
        self.job = {"tasks": tasks, **job}
        self.name, self.limit_s = name, limit_s
        self.environment = environment or {}
        self.started: dict[str, Any] = {}
        self._log, self._wait = log, wait
        self._unread = b""

    def __enter__(self) -> Self:
        self._deadline = time.monotonic() + self.limit_s
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-gumiho-")
        self.log = self._log or Path(self._folder.name) / "log"
        command = [sys.executable, "-m", "vllm_gumiho.engines.worker"]
        self._process = spawn(command, self.log, engine_environment(**self.environment), asked=True)
        try:
            self._say(self.job)
            if self._wait:
                self.started = self._hear()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def ask(self, do: str, **request: Any) -> Any:
        """The answer to one request."""
        self._say({"do": do, **request})
        if not self._wait:
            self._wait, self.started = True, self._hear()
        return self._hear()

    def _say(self, line: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: `_hear` says how
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()

    def _hear(self) -> Any:
        answer = json.loads(self._line())
        if "error" in answer:
            # argparse says why in the log, and its exception only that it ended.
            reason = last_words(self.log) if answer["error"].startswith("SystemExit") else answer["error"]
            raise EngineError(f"{self.name} failed: {reason}")
        return answer["result"]

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            # Asked before the pipe is: what it wrote before it ended is then read below.
            ended = self._process.poll() is not None
            ready, _, _ = select.select([self._process.stdout], [], [], 0 if ended else _POLL_S)
            more = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            self._unread += more
            if more:
                continue
            if ended or ready:
                code = self._process.wait()
                raise EngineError(f"{self.name} failed: exit code {code}, last line: {last_words(self.log)}")
            if time.monotonic() > self._deadline:
                raise EngineError(f"{self.name} took more than {self.limit_s:.0f} s and was stopped; ask less of it")
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        end_group(self._process)
        self._folder.cleanup()
