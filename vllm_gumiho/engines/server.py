"""A real ``vllm serve`` in a process of its own."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from vllm_gumiho.engines.process import end_group, last_words, spawn
from vllm_gumiho.env import engine_environment
from vllm_gumiho.errors import EngineError

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
HOST = "127.0.0.1"
START_LIMIT_S = 1800


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serve(argv: list[str], log: Path, limit_s: float = START_LIMIT_S) -> Iterator[int]:
    """A server that answers; yields its port, ends the whole process group after.

    Raises: EngineError with the end of its log when it does not come up.
    """
    port = free_port()
    process = spawn([*VLLM, "serve", *argv, "--host", HOST, "--port", str(port)], log, engine_environment())
    deadline = time.monotonic() + limit_s
    try:
        while not _healthy(port):
            if process.poll() is not None:
                raise EngineError(f"the server ended with {process.returncode}: {last_words(log)}")
            if time.monotonic() > deadline:
                raise EngineError(f"the server did not answer in time: {last_words(log)}")
            time.sleep(0.3)
        yield port
    finally:
        end_group(process)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2):
            return True
    except OSError:
        return False
