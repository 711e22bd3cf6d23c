"""A real ``vllm serve`` on the loopback, its processes and its metrics."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
from soak.traffic import MODEL

START_LIMIT_S = 900
HOST = "127.0.0.1"


class Server:
    """``vllm serve TARGET`` in float32, with or without Gumiho, in a session of its own."""

    def __init__(
        self, target: Path, log: Path, port: int, *, gumiho: bool, max_model_len: int, max_num_seqs: int, kv_blocks: int
    ):
        self.url, self.port, self.log = f"http://{HOST}:{port}", port, log
        self.command = [
            str(Path(sys.executable).parent / "vllm"),
            "serve",
            str(target),
            "--served-model-name",
            MODEL,
            "--dtype",
            "float32",
            "--host",
            HOST,
            "--port",
            str(port),
            "--max-model-len",
            str(max_model_len),
            "--max-num-seqs",
            str(max_num_seqs),
            "--num-gpu-blocks-override",
            str(kv_blocks),
            "--enforce-eager",
            *(("--speculative-model", "gumiho") if gumiho else ()),
        ]
        self.process: psutil.Popen | None = None
        self.family: list[psutil.Process] = []
        self.given_up = False

    def start(self) -> float:
        """Start and wait for health.  Returns seconds.  Raises: RuntimeError with the log's end, or once given up."""
        self._refuse_if_given_up()
        begin = time.monotonic()
        environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        # oneDNN keeps the code of 1,024 shapes by default, with any model, and fills that cache for thousands of
        # requests: nothing could be told from memory before.
        environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
        with self.log.open("a") as out:
            self.process = psutil.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.family = [self.process]
        while self.health() != 200:
            self._refuse_if_given_up()
            if self.process.poll() is not None or time.monotonic() - begin > START_LIMIT_S:
                self.end()
                raise RuntimeError(f"the server did not start: {self.log.read_text()[-3000:]}")
            time.sleep(1)
        self.family = self.tree()
        self._refuse_if_given_up()
        return time.monotonic() - begin

    def give_up(self) -> None:
        """End it for good: no later start, nor one under way in another thread, leaves a server behind."""
        self.given_up = True
        self.end()

    def _refuse_if_given_up(self) -> None:
        if self.given_up:
            self.end()
            raise RuntimeError("the time is up; no server is started any more")

    def tree(self) -> list[psutil.Process]:
        """The process and its children; nothing once it is gone."""
        try:
            return [self.process, *self.process.children(recursive=True)] if self.process else []
        except psutil.Error:
            return []

    def health(self) -> int | None:
        """Status of ``/health``; None when nothing answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def metrics(self) -> dict[str, float]:
        """``/metrics`` by name, summed over labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            text = response.read().decode()
        sums: dict[str, float] = {}
        for name, value in re.findall(r"^([a-z_:]+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
            sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def child(self, name: str) -> psutil.Process | None:
        """The process that vLLM calls ``VLLM::<name>``; None where there is none, as with a worker inside the core."""
        for process in self.tree()[1:]:
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(f"VLLM::{name}"):
                    return process
        return None

    def memory(self) -> dict[str, int]:
        """Resident bytes by process name, for the whole tree; pages that processes share count once for each."""
        sizes: dict[str, int] = {}
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                sizes[process.name()] = sizes.get(process.name(), 0) + process.memory_info().rss
        return sizes

    def open_files(self) -> int:
        """Open file descriptors, sockets among them, of the whole process tree."""
        files = 0
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                files += process.num_fds()
        return files

    def leftovers(self, patience_s: float = 60) -> list[str]:
        """Names of the processes of the last start that are still there after that time."""
        _, alive = psutil.wait_procs(self.family, timeout=patience_s)
        names = []
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    names.append(process.name())
        return sorted(names)

    def stop(self) -> int | None:
        """SIGTERM, as an operator stops it.  Returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(120)
        except psutil.TimeoutExpired:
            return None

    def end(self) -> None:
        """Leave no process behind, whatever happened."""
        for process in {*self.family, *self.tree()}:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.process:
            with contextlib.suppress(psutil.Error):
                self.process.wait(60)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
