"""Cells into rows: medians and spread over the repeats, speedup over no speculation in the same cycle; the table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_gumiho.benchmark.grid import Grid


def summarise(grid: Grid, cells: Sequence[dict[str, Any]], not_run: str = "not run") -> list[dict[str, Any]]:
    """A row for each mode, variant and concurrency of the grid, in its order, with or without figures.

    Speedup is over the cell without speculation of the same cycle, mode and concurrency; ``[low, high]`` is its range.
    """
    at = {(c["mode"], c["label"], c["concurrency"], c["repeat"]): c for c in cells}
    rows = []
    for mode in grid.modes:
        for concurrency in grid.concurrency:
            for variant in grid.variants:
                found = [at.get((mode, variant.label, concurrency, repeat)) for repeat in range(grid.repeats)]
                off = [at.get((mode, "off", concurrency, repeat)) for repeat in range(grid.repeats)]
                rows.append(
                    {"mode": mode, "label": variant.label, "method": variant.method, "concurrency": concurrency}
                    | {"num_speculative_tokens": variant.length, **_row(found, off, not_run)}
                )
    if grid.assumed:
        for row in rows:
            row["equal"] = None
    return rows


def _row(found: Sequence[dict[str, Any] | None], off: Sequence[dict[str, Any] | None], not_run: str) -> dict[str, Any]:
    done = [cell for cell in found if cell is not None and cell["status"] == "ok"]
    failed = [cell["reason"] for cell in found if cell is not None and cell["status"] != "ok"]
    row: dict[str, Any] = {"cells": len(done), "of": len(found), "failed": len(failed), "reason": None}
    if len(done) < len(found):
        row["reason"] = failed[0] if failed else not_run
    if not done:
        return row
    speedups, equal = [], []
    for cell, base in zip(found, off, strict=True):
        if cell is not None and base is not None and cell["status"] == base["status"] == "ok":
            speedups.append(cell["output_tokens_per_s"] / base["output_tokens_per_s"])
            equal += [a == b for a, b in zip(cell["answers"], base["answers"], strict=True)]
    drafts = sum(cell["drafts"] for cell in done)
    # Cells of an earlier version do not have it.
    sent = [cell["draft_tokens"] for cell in done if "draft_tokens" in cell]
    positions = [cell for cell in done if cell["acceptance_per_position"] is not None]
    steps = [cell["step_ms"] for cell in done if cell.get("step_ms")]
    return row | {
        "output_tokens_per_s": _middle(cell["output_tokens_per_s"] for cell in done),
        "output_tokens_per_s_range": _range([cell["output_tokens_per_s"] for cell in done]),
        "tpot_ms": {p: _middle(cell["tpot_ms"][p] for cell in done) for p in ("p50", "p95")},
        "ttft_ms": {p: _middle(cell["ttft_ms"][p] for cell in done) for p in ("p50", "p95")},
        "speedup": _middle(speedups),
        "speedup_range": _range(speedups),
        "sent_per_draft": sum(sent) / drafts if drafts and len(sent) == len(done) else None,
        "acceptance_length": 1 + sum(cell["accepted_tokens"] for cell in done) / drafts if drafts else 1.0,
        "acceptance_per_position": [
            sum(rate * cell["drafts"] for rate, cell in zip(rates, positions, strict=True)) / drafts if drafts else 0.0
            for rates in zip(*(cell["acceptance_per_position"] for cell in positions), strict=True)
        ],
        "step_ms": {name: _middle(step[name] for step in steps) for name in steps[0]} if steps else None,
        "equal": [sum(equal), len(equal)] if equal else None,
    }


def show(console: Console, report: dict[str, Any]) -> None:
    """A header and a table for each mode; rows without figures keep their place and say why."""
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    installed = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    load = "/".join(map(str, report["load_average"]))
    console.print(
        f"{report['date']}, {report['seconds']:.0f} s, load average {load}\n{machine}\n{installed}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if report["assumed"]:
        console.print(report["assumed"], highlight=False, markup=False)
    for mode in dict.fromkeys(row["mode"] for row in report["summary"]):
        rows = [row for row in report["summary"] if row["mode"] == mode]
        for name, (columns, texts, notes) in TABLES.items():
            console.print(_table(f"{mode}: {name}", rows, columns, texts, notes))
        _show_reasons(console, rows)


def _speed(row: dict[str, Any]) -> list[str]:
    low_high = row["speedup_range"]
    speedup = "-"
    if row["speedup"] is not None:
        speedup = f"{row['speedup']:.2f}x" + (f" [{low_high[0]:.2f} {low_high[1]:.2f}]" if row["cells"] > 1 else "")
    pairs = (f"{_ms(row[name]['p50'])}/{_ms(row[name]['p95'])}" for name in ("tpot_ms", "ttft_ms"))
    return [f"{row['output_tokens_per_s']:.1f}", speedup, *pairs]


def _drafts(row: dict[str, Any]) -> list[str]:
    step = row["step_ms"]
    parts = [f"{step[name]:.1f}" for name in ("verify", "draft", "rest")] if step else ["n/a"] * 3
    if row["method"] == "none":
        return ["-", "-", "-", "-", *parts]
    positions = " ".join(f"{rate:.2f}".removeprefix("0") for rate in row["acceptance_per_position"])
    sent = "-" if row["sent_per_draft"] is None else f"{row['sent_per_draft']:.1f}"
    length = f"{row['acceptance_length']:.2f}"
    return [sent, length, positions, "/".join(map(str, row["equal"] or ["-"])), *parts]


# Columns after those of every table, what fills them, and what they mean.
TABLES: dict[str, tuple[list[str], Callable[[dict[str, Any]], list[str]], str]] = {
    "speed": (
        ["tok/s", "speedup", "TPOT ms\np50/p95", "TTFT ms\np50/p95"], _speed,
        "speedup: over off in the same cycle, median and range over cycles",
    ),
    "drafts and steps": (
        ["sent", "length", "accepted up to 1, 2, ...", "equal", "verify\nms", "draft\nms", "rest\nms"], _drafts,
        "sent: tokens verified a draft; length: 1 + accepted / drafts; equal: answers equal to off's; parts of a "
        "decoding step with the profiler on, n/a where vLLM marks none",
    ),
}  # fmt: skip


def _table(
    title: str, rows: list[dict[str, Any]], columns: list[str], texts: Callable[[dict[str, Any]], list[str]], notes: str
) -> Table:
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, caption=escape(notes))
    table.add_column("n", justify="right")
    table.add_column("method", no_wrap=True)
    for column in (*columns, "cells"):
        table.add_column(column, justify="right")
    seen = None
    for row in rows:
        if seen not in (None, row["concurrency"]):
            table.add_section()
        seen = row["concurrency"]
        filled = texts(row) if "output_tokens_per_s" in row else ["-"] * len(columns)
        line = [str(seen), row["label"], *filled, f"{row['cells']}/{row['of']}"]
        table.add_row(*map(escape, line), style="red" if row["failed"] else None)
    return table


def _show_reasons(console: Console, rows: list[dict[str, Any]]) -> None:
    """Why rows have fewer cells than asked for, a line a reason."""
    for reason in dict.fromkeys(row["reason"] for row in rows if row["reason"]):
        of_reason = [row for row in rows if row["reason"] == reason]
        labels = ", ".join(f"{row['label']} n={row['concurrency']}" for row in of_reason)
        style = "red" if any(row["failed"] for row in of_reason) else None
        console.print(f"{labels}: {reason.splitlines()[0][:300]}", style=style, highlight=False, markup=False)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _middle(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _range(values: list[float]) -> list[float] | None:
    return [min(values), max(values)] if values else None
