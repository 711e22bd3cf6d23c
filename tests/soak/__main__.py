"""Load and faults against a running ``vllm serve`` with the embedded target and its bundled head.

``python tests/soak --requests 1000 --concurrency 32`` (``make soak``): texts of a pool of greedy requests are taken
from a server without speculation; then a seeded mix of good, bad and abandoned requests goes to one with Gumiho; then
its processes are killed and it is started again.  Loopback only.  Exit code 1 if a promise is broken.
"""

from __future__ import annotations

import json
import platform
import sys
import threading
import time
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from soak import faults
from soak.load import Report, run_load
from soak.server import Server, free_port
from soak.traffic import mix, pool

# Tokens of a KV block in vLLM's CPU build.
BLOCK = 128
console = Console()


def main(
    requests: Annotated[int, typer.Option(help="Requests of the mix.")] = 1000,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 32,
    seed: int = 0,
    known: Annotated[int, typer.Option(help="Greedy requests whose texts are compared.")] = 48,
    max_num_seqs: Annotated[int, typer.Option(help="Requests the server decodes at once; the others queue.")] = 24,
    kv_blocks: Annotated[
        int, typer.Option(help="KV blocks (128 tokens each): few, so that requests are preempted.")
    ] = 24,
    limit_minutes: Annotated[float, typer.Option(help="Give up, and fail, after this time.")] = 90,
    with_faults: Annotated[bool, typer.Option("--faults/--no-faults", help="Kill processes after the load.")] = True,
    gumiho: Annotated[bool, typer.Option("--gumiho/--without-gumiho", help="Without: vLLM alone, to compare.")] = True,
    target: Annotated[Path, typer.Option(help="Target folder.")] = Path("models/SmolLM2-135M-Instruct"),
    output: Path = Path("out/soak.json"),
) -> None:
    """Run load and faults; print and write what was kept."""
    output.parent.mkdir(parents=True, exist_ok=True)
    log = output.with_suffix(".log")
    log.unlink(missing_ok=True)
    requests_known = pool(seed, known, 8, 16)
    sizes = {"max_model_len": 1024, "max_num_seqs": max_num_seqs, "kv_blocks": kv_blocks}
    port = free_port()
    plain = Server(target, log, port, gumiho=False, **sizes)
    server = Server(target, log, port, gumiho=gumiho, **sizes)
    report, begin = Report(), time.monotonic()
    watch = threading.Timer(60 * limit_minutes, _give_up, (limit_minutes, plain, server))
    watch.daemon = True
    watch.start()
    try:
        plain.start()
        texts = faults.answers(port, requests_known, 8)
        left_by_plain = faults.kill_server(plain)
        console.print(f"{len(texts)} texts without speculation")
        report.figures["seconds to start"] = round(server.start(), 1)
        faults.fill_cache(port, sizes["max_model_len"], kv_blocks * BLOCK)
        calls = mix(seed, requests, requests_known, sizes["max_model_len"])
        run_load(server, calls, concurrency, texts, report, lambda line: console.print(line, highlight=False))
        if with_faults:
            left = faults.kill_server(server, requests_known, report)
            report.promise(
                "a killed server leaves no more processes than one without Gumiho",
                left == left_by_plain,
                f"{', '.join(left) or 'none'}; without: {', '.join(left_by_plain) or 'none'}",
            )
            faults.restart(server, requests_known, texts, report, "a killed server")
            for name in ("EngineCore", "Worker"):
                if (child := server.child(name)) is not None:
                    faults.kill_child(server, name, child, requests_known, report)
                    faults.restart(server, requests_known, texts, report, f"a killed {name}")
        code = server.stop()
        left = server.leftovers()
        report.promise("SIGTERM ends it", code == 0 and not left, f"exit code {code}, left: {left or 'nothing'}")
    except (RuntimeError, OSError, HTTPException, psutil.Error) as error:
        report.promise("carried through", False, f"{type(error).__name__}: {error}")
    finally:
        plain.end()
        server.end()
        watch.cancel()
    report.figures["minutes in all"] = round((time.monotonic() - begin) / 60, 1)
    _write(output, report, {"requests": requests, "concurrency": concurrency, "seed": seed, "gumiho": gumiho, **sizes})
    _show(report)
    raise typer.Exit(0 if report.kept else 1)


def _give_up(minutes: float, *servers: Server) -> None:
    console.print(f"soak: not done after {minutes:g} minutes; ended", style="red")
    for server in servers:
        server.give_up()


def _write(output: Path, report: Report, options: dict) -> None:
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "load average at the end": round(psutil.getloadavg()[0], 1),
        "memory GiB": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        **{name: version(name) for name in ("vllm", "torch", "vllm-gumiho")},
        "date": time.strftime("%Y-%m-%d"),
    }
    promises = {name: {"kept": kept, "detail": detail} for name, (kept, detail) in report.promises.items()}
    content = {"options": options, "machine": machine, "promises": promises, "figures": report.figures}
    output.write_text(json.dumps(content, indent=2) + "\n")


def _show(report: Report) -> None:
    calls = Table("kind", "answered", "refused", "left", "failed", title="Calls")
    for kind, states in report.figures.get("calls", {}).items():
        calls.add_row(kind, *(str(states.get(state, 0)) for state in ("answered", "refused", "left", "failed")))
    console.print(calls)
    promises = Table("promise", "kept", "detail", title="Promises")
    for name, (kept, detail) in report.promises.items():
        promises.add_row(name, "[green]yes" if kept else "[red]NO", detail)
    console.print(promises)
    for name, value in report.figures.items():
        if name not in ("calls", "memory MiB by finished calls"):
            console.print(f"{name}: {value}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
