"""Time the kernels on a CUDA device: ``python -m vllm_gumiho.kernels.bench --output results.json``.

Every case is checked against the reference first, and only a right result is timed; what the last replay left is
checked again.  Timings are medians of CUDA graph replays, those of a case's methods in turn; a graph runs over several
sets of inputs and weights that together exceed the L2 cache several times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch

from vllm_gumiho.kernels.bench import cases, timing
from vllm_gumiho.kernels.bench.draft_round import DRAFT_VOCABULARY, RoundCase

HIDDEN_SIZES = [576, 2048, 4096, 8192]
BATCHES = [1, 2, 4, 8, 16, 32, 64]
# torch.compile tunes each shape for tens of seconds: these, in this order, while the time lasts.
COMPILED = [(4096, 1), (4096, 8), (4096, 64), (2048, 1), (8192, 1), (576, 1), (2048, 8), (8192, 8), (576, 8)]
ARGMAX_ROWS = [1, 5, 8, 40, 64, 320]
ROUND_BATCHES = [1, 8, 64]
# Weights and drafted tokens of further rounds at batch 1.
SMALL_ROUNDS = [("fp8", RoundCase.vocab), ("int8", RoundCase.vocab)]
SMALL_ROUNDS += [(weights, DRAFT_VOCABULARY) for weights in ("bf16", "fp8", "int8")]
Case: TypeAlias = cases.HeadsCase | cases.ArgmaxCase | RoundCase


@dataclass
class Row:
    """One line of the table; the times are None where nothing was timed, and ``note`` says why."""

    operation: str
    method: str
    hidden: int
    batch: int
    error: float | None
    tolerance: float
    megabytes: float
    microseconds: float | None = None
    gigabytes_per_second: float | None = None
    share_of_copy: float | None = None
    share_of_read: float | None = None
    clock_mhz: int | None = None  # of the multiprocessors, after the timing
    times_of_bytes: float | None = None  # of a draft round: its time over that of its bytes at copy bandwidth
    share_of_target_pass: float | None = None  # its time over that of a target pass's 15 GB
    note: str = ""

    @property
    def right(self) -> bool:
        """Whether it ran and the result was within the tolerance; false for NaN."""
        return self.error is not None and self.error <= self.tolerance

    def line(self) -> str:
        """For people."""
        error = "    none" if self.error is None else f"{self.error:8.2e}"
        text = f"{self.operation:<15} {self.method:<28} H={self.hidden:<5} B={self.batch:<4} error {error}"
        if self.microseconds is not None:
            text += f" {self.microseconds:9.1f} us {self.gigabytes_per_second:8.1f} GB/s {self.share_of_copy:7.1%}"
            text += f" of copy {self.share_of_read:6.1%} of read"
        if self.times_of_bytes is not None:
            text += f" = {self.times_of_bytes:.2f} x its bytes, {self.share_of_target_pass:.1%} of a target pass"
        return f"{text}  {self.note}".rstrip()


@dataclass(frozen=True)
class Rates:
    """GB/s of a copy, read and written bytes together, and of reading alone."""

    copy: float
    read: float


def checked(case: Case, sets: list, method: str, results: Iterable) -> tuple[float, float]:
    """The first wrong result's error and tolerance, else the largest error's."""
    checks = [case.check(method, result, inputs) for result, inputs in zip(results, sets, strict=True)]
    return next((c for c in checks if not c[0] <= c[1]), max(checks))


def check(case: Case, sets: list, method: str, run: Callable) -> Row:
    """Every set's result against the reference; not timed yet."""
    error, tolerance = checked(case, sets, method, (run(inputs) for inputs in sets))
    row = Row(case.operation, method, case.hidden, case.batch, error, tolerance, case.bytes(method) / 1e6)
    if not row.right:
        row.note = f"WRONG: error above {tolerance:.2e}; not timed"
    return row


def time_rows(case: Case, sets: list, rows: dict[str, Row], runs: dict[str, Callable], rates: Rates) -> None:
    """Time the right ones of a case's methods in turn, and hold what the last replay left to the reference."""
    graphs = {}
    for method in [method for method, row in rows.items() if row.right]:
        try:
            graphs[method] = timing.captured([partial(runs[method], inputs) for inputs in sets])
        except Exception as error:  # a baseline that cannot be captured is a result too
            rows[method].error, rows[method].note = None, _failed(error)
    if not graphs:
        return
    for (method, graph), microseconds in zip(graphs.items(), timing.in_turn(list(graphs.values())), strict=True):
        row = rows[method]
        row.error, row.tolerance = checked(case, sets, method, graph.results)
        if not row.right:
            row.note = f"WRONG after its replays: error above {row.tolerance:.2e}"
            continue
        row.microseconds = microseconds / len(sets)
        row.gigabytes_per_second = case.bytes(method) / row.microseconds / 1e3
        row.share_of_copy = row.gigabytes_per_second / rates.copy
        row.share_of_read = row.gigabytes_per_second / rates.read
        row.clock_mhz = timing.clock_mhz()
        if isinstance(case, RoundCase):
            row.times_of_bytes, row.share_of_target_pass = case.at_copy_bandwidth(method, row.microseconds, rates.copy)


def _failed(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200]


def plan(dry_run: bool, hidden_sizes: list[int], batches: list[int]) -> Iterator[tuple[Case, bool]]:
    """The cases and whether ``torch.compile`` is to be timed on them: those that take long come last."""
    if dry_run:
        yield cases.HeadsCase(hidden=80, batch=3, heads=2, dtype=torch.bfloat16, device="cpu"), False
        yield cases.HeadsCase(hidden=64, batch=1, heads=3, dtype=torch.float16, device="cpu"), False
        yield cases.ArgmaxCase(hidden=80, batch=5, vocab=1003, dtype=torch.bfloat16, device="cpu"), False
        for dtype in (torch.float32, torch.bfloat16):
            small = RoundCase(3, 64, 96, 4, 2, vocab=333, heads=2, context=9, dtype=dtype, device="cpu")
            yield small, False
            for weights in ("fp8", "int8"):
                yield replace(small, weights=weights), False
        return
    for hidden in hidden_sizes:
        for batch in batches:
            yield cases.HeadsCase(hidden, batch), False
    for rows in ARGMAX_ROWS:
        yield cases.ArgmaxCase(4096, rows), False
    # torch.compile's best at the sizes that matter most, before what may find no time left.
    for hidden, batch in COMPILED[:2]:
        if hidden in hidden_sizes and batch in batches:
            yield cases.HeadsCase(hidden, batch), True
    rounds = [RoundCase(b) for b in ROUND_BATCHES if RoundCase.hidden in hidden_sizes and b in batches]
    for case in rounds:
        yield case, False
    for case in rounds[:1]:
        yield case, True
        for weights, vocabulary in SMALL_ROUNDS:
            yield replace(case, weights=weights, vocab=vocabulary), False
    for hidden, batch in COMPILED[2:]:
        if hidden in hidden_sizes and batch in batches:
            yield cases.HeadsCase(hidden, batch), True


def run_case(case: Case, compiled: bool, rates: Rates | None) -> list[Row]:
    """Every method of one case, on the same sets; timed where there are rates to compare with."""
    try:
        sets = [case.inputs(seed) for seed in range(1 if rates is None else case.set_count(timing.l2_bytes()))]
    except torch.cuda.OutOfMemoryError:
        return [Row(case.operation, "all", case.hidden, case.batch, None, 0, 0, note="failed: out of device memory")]
    runs, rows = case.compiled_methods() if compiled else case.methods(), {}
    for method, run in runs.items():
        try:
            rows[method] = check(case, sets, method, run)
        except Exception as error:  # a baseline that does not run is a result too
            rows[method] = Row(case.operation, method, case.hidden, case.batch, None, 0, 0, note=_failed(error))
    if rates is not None:
        time_rows(case, sets, rows, runs, rates)
    return list(rows.values())


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where a result is wrong or a method failed, 2 where there is no device."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_gumiho.kernels.bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output", "--json", type=Path, metavar="F", help="write machine, versions and rows to this file"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, no timings")
    parser.add_argument("--hidden", nargs="+", type=int, default=HIDDEN_SIZES)
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--seconds", type=float, default=400, help="start no further case after this long (400)")
    args = parser.parse_args(argv)

    rates = None
    if args.dry_run:
        # Must come before Triton's import, which the kernels leave until their first launch.
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("no CUDA device here: timings need one; --dry-run checks the results on the CPU", file=sys.stderr)
        return 2
    else:
        rates = Rates(timing.copy_gigabytes_per_second(), timing.read_gigabytes_per_second())
        name, clock = torch.cuda.get_device_name(), timing.clock_mhz()
        print(f"{name}: copies at {rates.copy:.0f} GB/s, reads at {rates.read:.0f} GB/s, {clock} MHz", flush=True)
    started, rows, skipped = time.monotonic(), [], []
    for case, compiled in plan(args.dry_run, args.hidden, args.batch):
        if time.monotonic() - started > args.seconds:
            skipped.append(f"{case.operation} H={case.hidden} B={case.batch}{' torch.compile' if compiled else ''}")
            continue
        for row in run_case(case, compiled, rates):
            rows.append(row)
            print(row.line(), flush=True)
        if rates is not None:
            torch.cuda.empty_cache()
    if skipped:
        print(f"not run for lack of time: {'; '.join(skipped)}")
    if args.output:
        record = {"machine": timing.machine(), "skipped": skipped}
        record |= {f"{name}_gigabytes_per_second": rate for name, rate in (asdict(rates) if rates else {}).items()}
        args.output.write_text(json.dumps(record | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return int(not all(row.right for row in rows))
