"""Runs the grid: engines one after the other, the cycle of them repeated, so that methods alternate."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_gumiho.benchmark import offline, served
from vllm_gumiho.benchmark.grid import Grid, Variant
from vllm_gumiho.benchmark.report import summarise
from vllm_gumiho.benchmark.store import Store
from vllm_gumiho.engines.facts import machine, versions, with_python
from vllm_gumiho.errors import GumihoError
from vllm_gumiho.files import write_json

RUNNERS = {"offline": offline.run, "server": served.run}


def run(
    grid: Grid, output: Path, console: Console, resume: bool = True, max_minutes: float | None = None
) -> dict[str, Any]:
    """Run what is not finished, write ``report.json`` after each engine and return it.

    max_minutes: start no engine that, by the last one of its mode, would end later.

    Raises: BenchError when the output folder cannot be used.
    """
    header = {"versions": with_python(versions()), "machine": machine()}
    store = Store(output, {**grid.identity(), **header}, resume)
    deadline = time.monotonic() + 60 * max_minutes if max_minutes is not None else float("inf")
    reached: dict[str, float] = {}
    begun = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    engines = [(r, mode, variant) for r in range(grid.repeats) for mode in grid.modes for variant in grid.variants]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("cells", total=len(engines) * len(grid.concurrency))
        for repeat, mode, variant in engines:
            wanted = [c for c in grid.concurrency if not store.finished(mode, variant.label, c, repeat)]
            progress.update(task, description=f"{mode} {variant.label}, cycle {repeat + 1}")
            progress.advance(task, len(grid.concurrency) - len(wanted))
            started = time.monotonic()
            if not wanted or started + reached.get(mode, 0) > deadline:
                continue
            for cell in _cells(grid, mode, variant, wanted):
                status = "failed" if "reason" in cell else "ok"
                where = {"mode": mode, "label": variant.label, "method": variant.method, "repeat": repeat}
                store.add({**where, "num_speculative_tokens": variant.length, "status": status, **cell})
                progress.advance(task)
                progress.console.print(_line(where | cell), highlight=False, markup=False, soft_wrap=True)
            reached[mode] = time.monotonic() - started
            report = _report(grid, store, header, time.monotonic() - begun, max_minutes)
            write_json(output / "report.json", report)
    report = _report(grid, store, header, time.monotonic() - begun, max_minutes)
    write_json(output / "report.json", report)
    return report


def _cells(grid: Grid, mode: str, variant: Variant, wanted: list[int]) -> Any:
    """Cells of one engine; those it did not come to, with the reason, once it has failed."""
    left = list(wanted)
    try:
        for cell in RUNNERS[mode](grid, variant, wanted):
            left.remove(cell["concurrency"])
            yield cell
    except GumihoError as error:
        for concurrency in left:
            yield {"concurrency": concurrency, "reason": str(error)}


def _report(
    grid: Grid, store: Store, header: dict[str, Any], seconds: float, max_minutes: float | None
) -> dict[str, Any]:
    not_run = f"not run: no time left of {max_minutes:g} minutes" if max_minutes is not None else "not run"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        **header,
        "assumed": grid.assumed,
        "settings": grid.identity() | {"repeats": grid.repeats},
        "commands": {variant.label: served.commands(grid, variant) for variant in grid.variants},
        "summary": summarise(grid, list(store.cells.values()), not_run),
        "cells": list(store.cells.values()),
    }


def _line(cell: dict[str, Any]) -> str:
    title = f"{cell['mode']} {cell['label']}, {cell['concurrency']} at once, cycle {cell['repeat'] + 1}"
    if "reason" in cell:
        return f"{title}: failed: {cell['reason']}"
    return f"{title}: {cell['output_tokens_per_s']:.1f} tokens/s, {cell['output_tokens']} tokens"
