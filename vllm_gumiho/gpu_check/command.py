"""The command ``vllm-gumiho gpu-check``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_gumiho.engines.facts import machine, versions, with_python
from vllm_gumiho.errors import EngineError, GpuCheckError
from vllm_gumiho.files import write_json

REPORT = "report.json"


def gpu_check(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for report.json and logs.")] = Path("out/gpu"),
    only: Annotated[list[str] | None, typer.Option(help="A part by its name; repeat. Default: all.")] = None,
    max_minutes: Annotated[float, typer.Option(help="Start no part that would end later.")] = 9.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tiny sizes on the CPU, kernels in Triton's interpreter; no result.")
    ] = False,
) -> None:
    """What holds on this machine's GPU: kernels, engines in every mode, drafts against the reference, speed.

    A line a part: holds, does not hold, or not run and why.  Exit code 1 if one does not hold.
    """
    import torch

    from vllm_gumiho.gpu_check.parts import FAILS, PARTS, Check, Machine

    unknown = [name for name in only or () if name not in PARTS]
    if unknown:
        raise GpuCheckError(f"--only {unknown[0]!r}: no such part; give one of {', '.join(PARTS)}")
    gpus = 0 if dry_run else torch.cuda.device_count()
    if not gpus and not dry_run:
        raise GpuCheckError("PyTorch sees no GPU here; --dry-run goes through every part on the CPU")
    output.mkdir(parents=True, exist_ok=True)
    started, console = time.monotonic(), Console()
    check = Check(Machine(gpus), output.resolve(), started + 60 * max_minutes)
    report: dict[str, Any] = {"machine": machine(), "versions": with_python(versions()), "dry_run": dry_run}
    outcomes = []
    for part in only or PARTS:
        outcomes.append(run_part(check, part, *PARTS[part]))
        console.print(outcomes[-1].line(), highlight=False, markup=False, soft_wrap=True)
        report["parts"] = {one.part: vars(one) | {"state": one.state} for one in outcomes}
        write_json(output / REPORT, report)
    console.print(str(output / REPORT), highlight=False, markup=False, soft_wrap=True)
    if any(one.state == FAILS for one in outcomes):
        raise typer.Exit(1)


def run_part(check: Any, part: str, run: Callable[[Any, str], Any], estimate: float) -> Any:
    """One part's outcome; whatever it raises is what does not hold."""
    from vllm_gumiho.gpu_check.parts import Outcome

    begin = time.monotonic()
    left = check.deadline - begin
    if left < estimate:
        return Outcome(part, why=f"{max(0, left):.0f} s left of the time, {estimate:.0f} needed", run=False)
    try:
        outcome = run(check, part)
    except EngineError as error:
        outcome = Outcome(part, [str(error)])
    outcome.seconds = round(time.monotonic() - begin, 1)
    return outcome
