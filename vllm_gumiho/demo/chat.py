"""Chat with a real target without and with Gumiho, one question at a time and several; compare texts and speed."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_gumiho.demo.picture import Picture, Run, answers, in_words, speeds
from vllm_gumiho.drafters import PER_REQUEST
from vllm_gumiho.drafters.checkpoints import Checkpoint, open_checkpoint
from vllm_gumiho.engines.counters import Counts, ratio
from vllm_gumiho.engines.facts import default_dtype, on_cpu
from vllm_gumiho.engines.process import Worker
from vllm_gumiho.engines.prompts import QUESTIONS
from vllm_gumiho.engines.target import find_target
from vllm_gumiho.files import check_writable, write_json
from vllm_gumiho.request.catalogue import HEADS, checkpoint_for, local_path
from vllm_gumiho.request.lengths import AUTO, SCHEDULE, TOKENS, draft_length
from vllm_gumiho.request.per_request import CONFIDENT

TASKS = "vllm_gumiho.demo.tasks"
OFF, ON = "speculation off", "Gumiho"
# An engine that had its turn looks for work for a second more before it leaves the cores.
REST_S = 1.2
SLICE_S = 0.2
# K by requests at once for the bundled head on a CPU, as `tune` measured it for the head before: today's is within the
# differences of its rounds (docs/results/auto.md).
CPU_SCHEDULE = [[1, 1, 4], [2, 3, 2], [4, 7, 1], [8, 8, 0]]


def run_demo(
    target: str,
    checkpoint: str,
    num_speculative_tokens: int | str | None,
    max_tokens: int,
    concurrencies: tuple[int, ...],
    output: Path,
    console: Console,
) -> bool:
    """Run the demonstration and write its JSON report; returns whether all texts are equal.

    On the CPU the target runs in float32, where one-token and many-token products differ by rounding alone.  There K is
    the longest draft, and drafts end by request; None is `CPU_SCHEDULE` for a bundled head.  Else None is all that the
    checkpoint has.  The engines' log goes to a file beside the report.
    """
    check_writable(output)
    with console.status("looking for the target"):
        target = find_target(target)
    opened = open_checkpoint(local_path(checkpoint_for(checkpoint, target)))
    speculative = {"method": opened.drafter.name, "model": checkpoint} | _lengths(num_speculative_tokens, opened)
    settings: dict[str, Any] = {
        "model": target,
        "max_model_len": 1024,
        "max_num_seqs": max(concurrencies),
        "disable_log_stats": False,
        "dtype": default_dtype(),
        "enforce_eager": on_cpu(),
        "enable_prefix_caching": False,
    }
    log = output.with_suffix(".log")
    log.unlink(missing_ok=True)
    console.print(f"log of the engines: {log}", highlight=False, soft_wrap=True)
    with contextlib.ExitStack() as stack:
        engines = {}
        for name, more in ((OFF, {}), (ON, {"speculative_config": speculative})):
            with console.status(f"starting the engine: {name}"):
                engines[name] = stack.enter_context(Worker(TASKS, {"llm": settings | more}, name, log=log))
        rounds = {at_once: _round(engines, at_once, max_tokens, console) for at_once in concurrencies}
        different = [
            (at_once, number)
            for at_once, runs in rounds.items()
            for number in range(len(QUESTIONS))
            if runs[OFF].tokens[number] != runs[ON].tokens[number]
        ]
        report = _report(rounds, engines[ON].started, not different)
        report = {"target": target, "checkpoint": checkpoint, "speculative_config": speculative} | report
        write_json(output, report)
        first = rounds[concurrencies[0]]
        console.print(answers(first[OFF], first[ON]))
        console.print(speeds(report))
        if different:
            _explain(console, engines[OFF], rounds, different)
    console.print(in_words(report), style="bold", highlight=False)
    console.print(f"report: {output}", highlight=False, soft_wrap=True)
    return not different


def _lengths(asked: int | str | None, opened: Checkpoint) -> dict[str, Any]:
    """Keys of the speculative config for a K as `run_demo` is given it."""
    if asked == AUTO:
        return {TOKENS: AUTO}
    most = draft_length(asked, opened)
    if not on_cpu():
        return {TOKENS: most}
    if asked is None and opened.path in HEADS.values():
        return {TOKENS: max(k for *_, k in CPU_SCHEDULE), SCHEDULE: CPU_SCHEDULE}
    return {TOKENS: most, PER_REQUEST: CONFIDENT}


def _round(engines: dict[str, Worker], at_once: int, max_tokens: int, console: Console) -> dict[str, Run]:
    """All questions, ``at_once`` at a time; the engines take turns."""
    runs = {name: Run() for name in engines}
    with Picture(console, list(engines), at_once) as picture:
        for first in range(0, len(QUESTIONS), at_once):
            numbers = list(range(first, min(first + at_once, len(QUESTIONS))))
            for name, engine in engines.items():
                time.sleep(REST_S)
                engine.ask("begin", numbers=numbers, max_tokens=max_tokens)
                found = {"left": len(numbers)}
                while found["left"]:
                    found = engine.ask("advance", seconds=SLICE_S)
                    picture.show(name, numbers, found)
                runs[name].add(found)
    for name, engine in engines.items():
        runs[name].counts = engine.ask("counts")
    return runs


def _report(rounds: dict[int, dict[str, Run]], started: dict[str, Any], equal: bool) -> dict[str, Any]:
    """Figures of all rounds.  Drafts differ in length: there is no share of them that was accepted at a position."""
    found = {}
    for at_once, runs in rounds.items():
        off, on = runs[OFF], runs[ON]
        counts = Counts(**on.counts)
        found[str(at_once)] = {
            "tokens_per_s_off": off.speed,
            "tokens_per_s_on": on.speed,
            "speedup": ratio(on.speed, off.speed),
            # Accepted tokens behind the end of an answer are counted and not written.
            "tokens_per_pass": ratio(on.written, on.passes),
            "drafts": counts.drafts,
            "sent": counts.draft_tokens,
            "accepted": counts.accepted_tokens,
        }
    return {
        "vllm_version": started["vllm"],
        "model_runner": started["model_runner"],
        "num_speculative_tokens": started["draft_length"],
        "prompts": len(QUESTIONS),
        "outputs_equal": equal,
        "rounds": found,
    }


def _explain(
    console: Console, engine: Worker, rounds: dict[int, dict[str, Run]], different: list[tuple[int, int]]
) -> None:
    """Say where answers part, and how close the target's two best logits are there."""
    for at_once, number in different:
        a, b = (rounds[at_once][name].tokens[number] for name in (OFF, ON))
        at = next((j for j, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        apart = engine.ask("gap", number=number, answer=a[:at])
        console.print(
            f"texts differ: prompt {QUESTIONS[number]!r}, answer token {at}: {a[at : at + 1]} without, "
            f"{b[at : at + 1]} with Gumiho; the target's two best logits there are {apart:.2e} apart",
            style="red",
            markup=False,
        )
