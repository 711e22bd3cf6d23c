"""Server cells: a real ``vllm serve``, driven by ``vllm bench serve``, vLLM's own client, in processes of their own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_gumiho.benchmark import BenchError
from vllm_gumiho.benchmark.grid import Grid, Variant

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
HOST = "127.0.0.1"
START_LIMIT_S = 1800
CLIENT_LIMIT_S = 7200
# One request before the measured ones, so that the first cell does not pay for what is made on first use.
CLIENT_ARGS = ("--save-result", "--save-detailed", "--disable-tqdm", "--num-warmups", "1",
               "--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,95")  # fmt: skip


def run(grid: Grid, variant: Variant, wanted: list[int]) -> Iterator[dict[str, Any]]:
    """Cells of one server as they finish, for the wanted concurrencies.  Raises: BenchError when it does not start."""
    with (
        tempfile.TemporaryDirectory(prefix="vllm-gumiho-bench-") as scratch,
        # Started first: it imports vLLM while the server does.
        Client(Path(scratch)) as client,
        serve(grid.engine_argv(variant), Path(scratch) / "server.log") as port,
    ):
        for concurrency in wanted:
            cell: dict[str, Any] = {"kind": "cell", "concurrency": concurrency}
            try:
                cell |= read_result(client.run(client_argv(grid, concurrency, port)), variant.length)
            except BenchError as error:
                cell["reason"] = str(error)
            yield cell


def client_argv(grid: Grid, concurrency: int, port: int) -> list[str]:
    """Arguments of ``vllm bench serve`` for one cell."""
    address = ["--model", grid.target, "--host", HOST, "--port", str(port)]
    return [*address, *CLIENT_ARGS, *grid.request_argv(concurrency)]


def commands(grid: Grid, variant: Variant) -> list[str]:
    """The cells' commands as a user would type them."""
    start = ["vllm", "serve", *grid.engine_argv(variant), "--host", HOST, "--port", "8000"]
    asks = [["vllm", "bench", "serve", *client_argv(grid, c, 8000)] for c in grid.concurrency]
    return [shlex.join(command) for command in (start, *asks)]


@contextlib.contextmanager
def serve(argv: list[str], log: Path, limit_s: float = START_LIMIT_S) -> Iterator[int]:
    """A server that answers; yields its port, ends the whole process group after.

    Raises: BenchError with the end of its log when it does not come up.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*VLLM, "serve", *argv, "--host", HOST, "--port", str(port)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_until_up(process, port, time.monotonic() + limit_s, log)
        yield port
    finally:
        _end(process)


class Client:
    """A process that runs ``vllm bench serve`` when asked; see `vllm_gumiho.benchmark.client`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = (folder / "client.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm_gumiho.benchmark.client"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"}, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        _end(self.process)
        self.log.close()

    def run(self, argv: list[str], limit_s: float = CLIENT_LIMIT_S) -> dict[str, Any]:
        """The result that the client saves.  Raises: BenchError with its error, or when it ends or takes too long."""
        result = self.folder / "result.json"
        result.unlink(missing_ok=True)
        asked = json.dumps([*argv, "--result-dir", str(self.folder), "--result-filename", result.name])
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(asked.encode() + b"\n")
            self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], limit_s)
        answer = self.process.stdout.readline() if ready else b""
        said = _tail((self.folder / "client.log").read_text(errors="replace"))
        if not ready:
            raise BenchError(f"vllm bench serve took over {limit_s:g} s: {said}")
        if not answer:
            raise BenchError(f"vllm bench serve ended: {said}")
        if reason := json.loads(answer)["error"]:
            raise BenchError(f"vllm bench serve: {said if reason.startswith('SystemExit') else reason}")
        return json.loads(result.read_text())


def read_result(result: dict[str, Any], length: int) -> dict[str, Any]:
    """Figures of one cell out of the client's result; the same names as offline cells have.

    Raises: BenchError when a request failed, as figures over the others would flatter.
    """
    if result["failed"] or not result["completed"]:
        total = result["completed"] + result["failed"]
        said = next(
            (error.strip().splitlines()[-1] for error in result.get("errors", []) if error.strip()), "no reason"
        )
        raise BenchError(f"{result['failed']} of {total} requests failed: {said}")
    drafts = result.get("spec_decode_num_drafts", 0)
    positions = result.get("spec_decode_per_position_acceptance_rates", [])
    return {
        "requests": result["completed"], "output_tokens": result["total_output_tokens"], "seconds": result["duration"],
        "output_tokens_per_s": result["output_throughput"],
        "tpot_ms": {p: result[f"{p}_tpot_ms"] for p in ("p50", "p95")},
        "ttft_ms": {p: result[f"{p}_ttft_ms"] for p in ("p50", "p95")},
        "drafts": drafts, "accepted_tokens": result.get("spec_decode_accepted_tokens", 0),
        # A server that has not drafted yet shows no counters, and the client then reports none.
        "acceptance_length": result.get("spec_decode_acceptance_length") if length else 1.0,
        "acceptance_per_position": [*positions, *[0.0] * length][:length] if drafts or not length else None,
        "step_ms": None,
        "answers": [hashlib.sha256(text.encode()).hexdigest()[:12] for text in result["generated_texts"]],
    }  # fmt: skip


def _wait_until_up(process: subprocess.Popen[bytes], port: int, deadline: float, log: Path) -> None:
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    state = "did not answer in time" if process.poll() is None else f"ended with {process.returncode}"
    raise BenchError(f"the server {state}: {_tail(log.read_text(errors='replace'))}")


def _end(process: subprocess.Popen[bytes]) -> None:
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


def _tail(text: str) -> str:
    """The last error line of a log, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no output"]
    errors = [line for line in lines if "Error" in line and "for the root cause" not in line]
    return (errors or lines)[-1][-400:]
