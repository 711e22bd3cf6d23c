"""Time every tiling of the parallel heads that fits: ``python -m vllm_gumiho.kernels.bench.tilings --output F``.

`choose_tiling` goes by a model of a stage's time.  This holds the model to a device: for each number of heads, batch
tile and kind of weights, a line for every tiling with its error against the reference, its time, and the model's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vllm_gumiho.kernels.bench import timing
from vllm_gumiho.kernels.bench.cases import HeadsCase, HeadsInputs
from vllm_gumiho.kernels.parallel_heads import new_counters
from vllm_gumiho.kernels.parallel_heads.dispatch import device_of, single_launch_problem
from vllm_gumiho.kernels.parallel_heads.tiling import Tiling, choose_tiling, fitting_tilings, stage_time

COUNTS, BATCHES = [1, 2, 3, 4, 5], [16, 32]


@dataclass
class Line:
    """One tiling at one shape.  model: a stage's time over that of its weights.  microseconds: None where not timed."""

    hidden: int
    heads: int
    batch: int
    weights: str
    tiling: Tiling
    chosen: bool
    error: float
    tolerance: float
    model: float
    microseconds: float | None = None
    gigabytes_per_second: float | None = None

    @property
    def right(self) -> bool:
        """Whether the result was within the tolerance; false for NaN."""
        return self.error <= self.tolerance

    def text(self) -> str:
        """For people."""
        t = self.tiling
        tiles = f"{t.block_h}x{t.block_k} depth {t.num_stages}, {t.programs} programs{', spread' if t.spread else ''}"
        said = f"{self.heads} heads B={self.batch} {self.weights:<4} {tiles:<44} error {self.error:8.2e}"
        if not self.right:
            return f"{said}  WRONG: above {self.tolerance:.2e}"
        if self.microseconds is not None:
            said += f" {self.microseconds:8.1f} us {self.gigabytes_per_second:7.0f} GB/s"
        return f"{said}  model {self.model:.2f}{'  chosen' if self.chosen else ''}"


def run(inputs: HeadsInputs, tiling: Tiling, small: bool, counters: Tensor | None) -> Tensor:
    """z ``[n, B, H]`` by one launch, or without counters by one launch per stage."""
    from vllm_gumiho.kernels.parallel_heads.triton import parallel_heads_triton

    weights, scales = (inputs.small, inputs.scales) if small else (inputs.weights, None)
    hidden = weights.weight.shape[-1]
    rest, last = inputs.m[:, :-hidden], inputs.m[:, -hidden:]
    return parallel_heads_triton(rest, last, weights, scales, tiling, counters, False)


def measure(case: HeadsCase, weights: str, timed: bool) -> list[Line]:
    """Every fitting tiling of a case, by one launch where it can be; the right ones are timed in turn."""
    method = "triton, fp8 weights" if weights == "fp8" else "triton"
    sizes = 1 if weights == "fp8" else case.dtype.itemsize, case.dtype.itemsize
    inputs = case.inputs(0)
    device, place = device_of(inputs.m.device), inputs.m.device
    shape = (case.batch, case.heads, case.hidden, *sizes, device)
    chosen = choose_tiling(*shape)
    one_launch = place.type == "cuda" and single_launch_problem(place.index or 0) is None
    counters = new_counters(place) if one_launch else None
    lines, graphs = [], {}
    for tiling in fitting_tilings(*shape):
        call = partial(run, inputs, tiling, weights == "fp8", counters)
        error, tolerance = case.check(method, call(), inputs)
        model = stage_time(case.hidden, case.heads, tiling, *sizes, device)
        line = Line(case.hidden, case.heads, case.batch, weights, tiling, tiling == chosen, error, tolerance, model)
        lines.append(line)
        if timed and line.right:
            graphs[len(lines) - 1] = timing.captured([call])
    for number, microseconds in zip(graphs, timing.in_turn(list(graphs.values())) if graphs else [], strict=True):
        lines[number].microseconds = microseconds
        lines[number].gigabytes_per_second = case.bytes(method) / microseconds / 1e3
    return lines


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where a result is wrong, 2 where there is no device."""
    parser = argparse.ArgumentParser(prog="python -m vllm_gumiho.kernels.bench.tilings", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="F", help="write machine and lines to this file")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, no timings")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=120, help="start no further shape after this long (120)")
    args = parser.parse_args(argv)
    if args.dry_run:
        # Must come before Triton's import, which the kernels leave until their first launch.
        os.environ["TRITON_INTERPRET"] = "1"
        cases = [HeadsCase(80, 3, heads, torch.bfloat16, "cpu") for heads in (2, 3)]
    elif not torch.cuda.is_available():
        print("no CUDA device here: timings need one; --dry-run checks the results on the CPU", file=sys.stderr)
        return 2
    else:
        cases = [HeadsCase(args.hidden, batch, heads) for heads in reversed(COUNTS) for batch in BATCHES]
    started, lines = time.monotonic(), []
    for case in cases:
        for weights in ("bf16", "fp8"):
            if time.monotonic() - started > args.seconds:
                print(f"not run for lack of time: {case.heads} heads B={case.batch} {weights}")
                continue
            for line in measure(case, weights, timed=not args.dry_run):
                lines.append(line)
                print(line.text(), flush=True)
    if args.output:
        record = {"machine": timing.machine(), "lines": [asdict(line) for line in lines]}
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    return int(not all(line.right for line in lines))


if __name__ == "__main__":
    sys.exit(main())
