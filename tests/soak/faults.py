"""Processes killed: what the clients see, what is left behind, and that a restart answers as before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import psutil
from soak.load import Report, run_calls
from soak.server import Server
from soak.traffic import MODEL, Call, Outcome

GIVE_UP_S = 120


def answers(port: int, known: dict[str, tuple[str, dict]], concurrency: int, keys: list[str] | None = None) -> dict:
    """Texts of known greedy requests by key.  Raises: RuntimeError for one that was not answered."""
    calls = [Call("known", *known[key], text_of=key) for key in keys or known]
    outcomes = asyncio.run(run_calls(port, calls, concurrency))
    if bad := [o for o in outcomes if o.state != "answered"]:
        raise RuntimeError(f"{bad[0].call.text_of} {bad[0].state}: {bad[0].detail}")
    return {o.call.text_of: o.text for o in outcomes}


def fill_cache(port: int, max_model_len: int, tokens: int) -> None:
    """Write every KV block once: its memory counts as resident only from then on, and would look like a leak."""
    calls = [
        Call("fill", "/v1/completions", {"model": MODEL, "prompt": [100 + i] * (max_model_len - 2), "max_tokens": 1})
        for i in range(2 * tokens // max_model_len)
    ]
    if bad := [o for o in asyncio.run(run_calls(port, calls, 4)) if o.state != "answered"]:
        raise RuntimeError(f"filling the cache {bad[0].state}: {bad[0].detail}")


def kill_server(server: Server, known: dict | None = None, report: Report | None = None) -> list[str]:
    """SIGKILL the API server, under requests where there is a report, which must end with an error.

    Returns the names of processes that outlive it by a minute, after ending those too.
    """
    assert server.process is not None
    if report is None:
        server.process.kill()
    else:
        kill_under_requests(server.port, known or {}, server.process.kill, report, "a killed server")
    left = server.leftovers()
    server.end()
    return left


def kill_under_requests(port: int, known: dict, kill: Callable[[], None], report: Report, what: str) -> None:
    """Kill a process while long requests decode: each must end with an error, and none hang."""
    long = [
        Call("in flight", path, body | {"max_tokens": 400, "ignore_eos": True})
        for path, body in list(known.values())
        if "structured_outputs" not in body
    ][:8]

    async def scene() -> list[Outcome]:
        running = asyncio.create_task(run_calls(port, long, len(long)))
        await asyncio.sleep(5)
        kill()
        return await asyncio.wait_for(running, GIVE_UP_S)

    begin = time.monotonic()
    try:
        outcomes = asyncio.run(scene())
        states = [o.state for o in outcomes]
        report.promise(
            f"requests of {what} end with an error",
            states == ["failed"] * 8,
            f"{len(states)} ended within {time.monotonic() - begin - 5:.0f} s; first: {outcomes[0].detail[:80]}",
        )
    except asyncio.TimeoutError:
        report.promise(f"requests of {what} end with an error", False, f"some hang after {GIVE_UP_S} s")


def restart(server: Server, known: dict, texts: dict[str, str], report: Report, after: str) -> None:
    """Start on the same port and compare a few answers."""
    seconds = server.start()
    keys = list(known)[:4]
    given = answers(server.port, known, len(keys), keys)
    equal = all(given[key] == texts[key] for key in keys)
    report.promise(f"restart after {after} answers as before", equal, f"healthy after {seconds:.0f} s")


def kill_child(server: Server, name: str, child: psutil.Process, known: dict, report: Report) -> None:
    """SIGKILL a process behind the API under requests: they must end with an error, and the server must tell."""
    what = f"a killed {name}"
    kill_under_requests(server.port, known, child.kill, report, what)
    assert server.process is not None
    end = time.monotonic() + GIVE_UP_S
    while server.process.poll() is None and server.health() == 200 and time.monotonic() < end:
        time.sleep(1)
    # With a dead engine the server says so on /health, or ends itself; vLLM 0.32 then exits with 0, with any model.
    health = server.health()
    while health is None and server.process.poll() is None and time.monotonic() < end:
        time.sleep(1)
    code = server.process.poll()
    told = code is not None or (health is not None and health >= 500)
    report.promise(f"{what} ends the server, or /health says so", told, f"/health {health}, exit code {code}")
    if code is not None:
        left = server.leftovers()
        report.promise(f"{what} leaves no process", not left, ", ".join(left) or "none")
    server.end()
