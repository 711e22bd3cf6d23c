"""Server cells: a real ``vllm serve``, driven by ``vllm bench serve``, vLLM's own client, in processes of their own."""

from __future__ import annotations

import hashlib
import json
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_gumiho.benchmark.grid import Grid, Variant
from vllm_gumiho.engines.process import Worker
from vllm_gumiho.engines.server import HOST, serve
from vllm_gumiho.errors import BenchError, EngineError

CLIENT = "vllm_gumiho.benchmark.client"
CLIENT_LIMIT_S = 7200
# One request before the measured ones, so that the first cell does not pay for what is made on first use.
CLIENT_ARGS = (
    "--save-result",
    "--save-detailed",
    "--disable-tqdm",
    "--num-warmups",
    "1",
    "--percentile-metrics",
    "ttft,tpot",
    "--metric-percentiles",
    "50,95",
)


def run(grid: Grid, variant: Variant, wanted: list[int]) -> Iterator[dict[str, Any]]:
    """Cells of one server as they finish, for the wanted concurrencies.  Raises: EngineError when it does not start."""
    with (
        tempfile.TemporaryDirectory(prefix="vllm-gumiho-bench-") as scratch,
        # Started first: it imports vLLM while the server does.
        Worker(CLIENT, {}, "vllm bench serve", CLIENT_LIMIT_S, wait=False) as client,
        serve(grid.engine_argv(variant), Path(scratch) / "server.log") as port,
    ):
        for concurrency in wanted:
            cell: dict[str, Any] = {"concurrency": concurrency}
            try:
                cell |= read_result(ask(client, client_argv(grid, concurrency, port), Path(scratch)), variant.length)
            except (BenchError, EngineError) as error:
                cell["reason"] = str(error)
            yield cell


def ask(client: Worker, argv: list[str], folder: Path) -> dict[str, Any]:
    """The result that the client saves in ``folder``.  Raises: EngineError with its error."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    client.ask("bench serve", argv=[*argv, "--result-dir", str(folder), "--result-filename", result.name])
    return json.loads(result.read_text())


def client_argv(grid: Grid, concurrency: int, port: int) -> list[str]:
    """Arguments of ``vllm bench serve`` for one cell."""
    address = ["--model", grid.target, "--host", HOST, "--port", str(port)]
    return [*address, *CLIENT_ARGS, *grid.request_argv(concurrency)]


def commands(grid: Grid, variant: Variant) -> list[str]:
    """The cells' commands as a user would type them."""
    start = ["vllm", "serve", *grid.engine_argv(variant), "--host", HOST, "--port", "8000"]
    asks = [["vllm", "bench", "serve", *client_argv(grid, c, 8000)] for c in grid.concurrency]
    return [shlex.join(command) for command in (start, *asks)]


def read_result(result: dict[str, Any], length: int | str) -> dict[str, Any]:
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
    most = length if isinstance(length, int) else len(positions)
    return {
        "requests": result["completed"],
        "output_tokens": result["total_output_tokens"],
        "seconds": result["duration"],
        "output_tokens_per_s": result["output_throughput"],
        "tpot_ms": {p: result[f"{p}_tpot_ms"] for p in ("p50", "p95")},
        "ttft_ms": {p: result[f"{p}_ttft_ms"] for p in ("p50", "p95")},
        "drafts": drafts,
        "draft_tokens": result.get("spec_decode_draft_tokens", 0),
        "accepted_tokens": result.get("spec_decode_accepted_tokens", 0),
        # A server that has not drafted yet shows no counters, and the client then reports none.
        "acceptance_length": result.get("spec_decode_acceptance_length") if length else 1.0,
        "acceptance_per_position": [*positions, *[0.0] * most][:most] if drafts or not length else None,
        "step_ms": None,
        "answers": [hashlib.sha256(text.encode()).hexdigest()[:12] for text in result["generated_texts"]],
    }
