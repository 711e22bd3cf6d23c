"""A real ``vllm serve`` on the loopback, its processes and its metrics."""

from __future__ import annotations

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
            str(Path(sys.executable).parent / "vllm"), "serve", str(target), "--served-model-name", MODEL,
            "--dtype", "float32", "--host", HOST, "--port", str(port), "--max-model-len", str(max_model_len),
            "--max-num-seqs", str(max_num_seqs), "--num-gpu-blocks-override", str(kv_blocks), "--enforce-eager",
            *(("--speculative-model", "gumiho") if gumiho else ()),
        ]  # fmt: skip
        self.process: psutil.Popen | None = None
        self.family: list[psutil.Process] = []

    def start(self) -> float:
        """Start and wait for health.  Returns seconds.  Raises: RuntimeError with the log's end."""
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
        while self.health() != 200:
            if self.process.poll() is not None or time.monotonic() - begin > START_LIMIT_S:
                self.end()
                raise RuntimeError(f"the server did not start: {self.log.read_text()[-3000:]}")
            time.sleep(1)
        self.family = [self.process, *self.process.children(recursive=True)]
        return time.monotonic() - begin

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
        assert self.process is not None
        children = self.process.children(recursive=True)
        return next((child for child in children if " ".join(child.cmdline()).startswith(f"VLLM::{name}")), None)

    def memory(self) -> dict[str, int]:
        """Resident bytes by process name, for the whole tree; pages that processes share count once for each."""
        sizes: dict[str, int] = {}
        assert self.process is not None
        for process in (self.process, *self.process.children(recursive=True)):
            try:
                sizes[process.name()] = sizes.get(process.name(), 0) + process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return sizes

    def open_files(self) -> int:
        """Open file descriptors, sockets among them, of the whole process tree."""
        assert self.process is not None
        return sum(process.num_fds() for process in (self.process, *self.process.children(recursive=True)))

    def leftovers(self, patience_s: float = 60) -> list[str]:
        """Names of the processes of the last start that are still there after that time."""
        _, alive = psutil.wait_procs(self.family, timeout=patience_s)
        return sorted(process.name() for process in alive if process.status() != psutil.STATUS_ZOMBIE)

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
        for process in self.family or ([self.process] if self.process else []):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        if self.process:
            self.process.wait(60)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
