"""The load: the mix through a number of workers at once, with memory watched, and what must hold afterwards."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from soak.server import HOST, Server
from soak.traffic import BAD, GOOD, LEAVING, Call, Outcome, send

REQUEST_LIMIT_S = 600
# Growth of the process tree's resident memory allowed between the second quarter and the last.
MEMORY_SLACK_BYTES, MEMORY_SLACK = 64 << 20, 0.05
OPEN_FILES_SLACK = 8
NOTHING_LEFT = {"vllm:num_requests_running": 0.0, "vllm:num_requests_waiting": 0.0, "vllm:kv_cache_usage_perc": 0.0}


@dataclass
class Report:
    """Promises with whether they were kept, and the figures behind them."""

    promises: dict[str, tuple[bool, str]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def promise(self, name: str, kept: bool, detail: str) -> None:
        self.promises[name] = (bool(kept), detail)

    @property
    def kept(self) -> bool:
        return all(kept for kept, _ in self.promises.values())


async def run_calls(
    port: int, calls: list[Call], concurrency: int, every: tuple[int, Callable[[int], None]] | None = None
) -> list[Outcome]:
    """Make the calls, ``concurrency`` at once.  every: (n, function called after each n-th finished call)."""
    waiting, outcomes = iter(calls), []
    limits = aiohttp.ClientTimeout(total=REQUEST_LIMIT_S)
    # The server closes idle connections after 5 s, and may do so just when one is used again: a connection a call.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(f"http://{HOST}:{port}", timeout=limits, connector=connector) as session:

        async def work() -> None:
            for call in waiting:
                outcomes.append(await send(session, HOST, port, call))
                if every and len(outcomes) % every[0] == 0:
                    await asyncio.to_thread(every[1], len(outcomes))

        await asyncio.gather(*(work() for _ in range(concurrency)))
    return outcomes


def run_load(
    server: Server,
    calls: list[Call],
    concurrency: int,
    texts: dict[str, str],
    report: Report,
    show: Callable[[str], None],
) -> None:
    """Send the mix and judge the answers, and the server once it is idle again."""
    memory: list[tuple[int, dict[str, int]]] = []
    files = server.open_files()

    def look(finished: int) -> None:
        memory.append((finished, server.memory()))
        show(f"{finished} of {len(calls)} done, {sum(memory[-1][1].values()) >> 20} MiB resident")

    before, begin = server.metrics(), time.monotonic()
    outcomes = asyncio.run(run_calls(server.port, calls, concurrency, (max(1, len(calls) // 40), look)))
    seconds = time.monotonic() - begin
    idle = _wait_until_idle(server)
    _judge_answers(outcomes, texts, report)
    for name, wanted in NOTHING_LEFT.items():
        report.promise(f"{name} back to 0", idle[name] == wanted, str(idle[name]))
    _judge_memory([(finished, sum(sizes.values())) for finished, sizes in memory], len(calls), report)
    left = server.open_files() - files
    report.promise("no open files left behind", left <= OPEN_FILES_SLACK, f"{left:+d} after the load")
    speculation = _speculation(before, idle)
    report.promise(
        "the KV cache ran out under load", speculation["preemptions"] > 0, f"{speculation['preemptions']} preemptions"
    )
    report.figures |= {
        "seconds of load": round(seconds, 1),
        "memory MiB by finished calls": {
            finished: {name: size >> 20 for name, size in sizes.items()} for finished, sizes in memory
        },
    } | speculation


def _judge_answers(outcomes: list[Outcome], texts: dict[str, str], report: Report) -> None:
    table = {kind: Counter(o.state for o in outcomes if o.call.kind == kind) for kind in GOOD | LEAVING | BAD}
    report.figures["calls"] = {kind: dict(states) for kind, states in table.items() if states}
    report.figures["sent"] = len(outcomes)
    report.figures |= {
        state: sum(states[state] for states in table.values()) for state in ("answered", "refused", "left", "failed")
    }
    wrong_end = [
        o
        for o in outcomes
        if o.state
        not in (("answered",) if o.call.kind in GOOD else ("refused",) if o.call.kind in BAD else ("left", "answered"))
    ]
    shown = "; ".join(f"{o.call.kind} {o.state}: {o.detail}" for o in wrong_end[:5])
    report.promise("good calls answered, bad ones refused, none failed", not wrong_end, shown or "all")
    compared = [o for o in outcomes if o.state == "answered" and o.call.text_of is not None]
    wrong = [o for o in compared if o.text != texts[o.call.text_of or ""]]
    shown = "; ".join(f"{o.call.text_of}: {o.text!r} instead of {texts[o.call.text_of or '']!r}" for o in wrong[:3])
    report.figures["greedy texts compared"] = len(compared)
    report.promise(
        "greedy texts are those without speculation",
        compared and not wrong,
        shown or f"{len(compared)} of {len(compared)} equal",
    )


def _judge_memory(memory: list[tuple[int, int]], count: int, report: Report) -> None:
    early = [size for finished, size in memory if 0.25 * count < finished <= 0.5 * count]
    late = [size for finished, size in memory if finished > 0.75 * count]
    if not early or not late:
        report.promise("memory flat", False, "too few calls to tell")
        return
    first, last = statistics.median(early), statistics.median(late)
    allowed = max(MEMORY_SLACK_BYTES, MEMORY_SLACK * first)
    report.promise(
        "memory flat",
        last - first <= allowed,
        f"{(last - first) / 2**20:+.0f} MiB on {first / 2**20:.0f} MiB (allowed {allowed / 2**20:.0f})",
    )


def _wait_until_idle(server: Server, limit_s: float = 120) -> dict[str, float]:
    """Metrics once nothing is left, or as they are after that time: an abort reaches the engine a step later."""
    end = time.monotonic() + limit_s
    while True:
        metrics = server.metrics()
        if all(metrics.get(name) == wanted for name, wanted in NOTHING_LEFT.items()) or time.monotonic() > end:
            return {name: metrics.get(name, float("nan")) for name in NOTHING_LEFT} | metrics
        time.sleep(1)


def _speculation(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    drafts = grown("vllm:spec_decode_num_drafts_total")
    accepted = grown("vllm:spec_decode_num_accepted_tokens_total")
    return {
        "drafts": int(drafts),
        "acceptance length": round(1 + accepted / drafts, 3) if drafts else None,
        "tokens generated": int(grown("vllm:generation_tokens_total")),
        "preemptions": int(grown("vllm:num_preemptions_total")),
        "prefix cache hits, tokens": int(grown("vllm:prefix_cache_hits_total")),
    }
