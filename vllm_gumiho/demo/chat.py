"""Chat with a real target without and with Gumiho; compare texts, acceptance and speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_gumiho.drafters.checkpoints import open_checkpoint
from vllm_gumiho.engines.counters import Counts, acceptance
from vllm_gumiho.engines.facts import default_dtype, on_cpu
from vllm_gumiho.engines.process import Worker
from vllm_gumiho.engines.prompts import QUESTIONS
from vllm_gumiho.engines.target import find_target
from vllm_gumiho.files import check_writable, write_json
from vllm_gumiho.request.catalogue import checkpoint_for, local_path
from vllm_gumiho.request.lengths import draft_length

TASKS = "vllm_gumiho.demo.tasks"


def run_demo(
    target: str,
    checkpoint: str,
    num_speculative_tokens: int,
    max_tokens: int,
    concurrency: int,
    output: Path,
    console: Console,
) -> bool:
    """Run the demonstration and write its JSON report; returns whether all texts are equal.

    On the CPU the target runs in float32, where one-token and many-token products differ by rounding alone.  The
    engines' log goes to a file beside the report.
    """
    check_writable(output)
    with console.status("looking for the target"):
        target = find_target(target)
    opened = open_checkpoint(local_path(checkpoint_for(checkpoint, target)))
    draft_length(num_speculative_tokens, opened)
    settings: dict[str, Any] = {
        "model": target,
        "max_model_len": 1024,
        "max_num_seqs": concurrency,
        "disable_log_stats": False,
        "dtype": default_dtype(),
        "enforce_eager": on_cpu(),
        "enable_prefix_caching": False,
    }
    speculative = {"method": opened.drafter.name, "model": checkpoint, "num_speculative_tokens": num_speculative_tokens}
    log = output.with_suffix(".log")
    log.unlink(missing_ok=True)
    console.print(f"log of the engines: {log}", highlight=False, soft_wrap=True)
    runs, started = {}, {}
    for name, more in (("speculation off", {}), ("Gumiho", {"speculative_config": speculative})):
        with (
            console.status(f"{name}: {len(QUESTIONS)} questions, {concurrency} at once"),
            Worker(TASKS, {"llm": settings | more}, name, log=log) as engine,
        ):
            runs[name], started[name] = engine.ask("chat", max_tokens=max_tokens), engine.started
    off, on = runs["speculation off"], runs["Gumiho"]

    figures = acceptance(Counts(**on["counts"]), num_speculative_tokens)
    different = [i for i in range(len(QUESTIONS)) if off["tokens"][i] != on["tokens"][i]]
    speeds = {name: sum(map(len, run["tokens"])) / run["seconds"] for name, run in runs.items()}
    report = {
        "target": target,
        "checkpoint": checkpoint,
        "vllm_version": started["Gumiho"]["vllm"],
        "model_runner": started["Gumiho"]["model_runner"],
        "num_speculative_tokens": num_speculative_tokens,
        "prompts": len(QUESTIONS),
        "outputs_equal": not different,
        "acceptance_length": figures["acceptance_length"],
        "acceptance_per_position": figures["acceptance_per_position"],
        "tokens_per_s_off": speeds["speculation off"],
        "tokens_per_s_on": speeds["Gumiho"],
        "speedup": speeds["Gumiho"] / speeds["speculation off"],
    }
    write_json(output, report)
    _show(console, report, off, on)
    if different:
        _explain(console, settings, log, off, on, different)
    console.print(f"report: {output}", highlight=False, soft_wrap=True)
    return not different


def _show(console: Console, report: dict[str, Any], off: dict[str, Any], on: dict[str, Any]) -> None:
    texts = Table("prompt", "answer", "equal", title="Greedy answers", show_lines=True)
    for question, text, a, b in zip(QUESTIONS, on["texts"], off["tokens"], on["tokens"], strict=True):
        texts.add_row(question, text.strip()[:200], "[green]yes" if a == b else "[red]no")
    console.print(texts)
    facts = Table("", "off", "Gumiho", title=f"vLLM {report['vllm_version']}, model runner {report['model_runner']}")
    facts.add_row("tokens/s", f"{report['tokens_per_s_off']:.1f}", f"{report['tokens_per_s_on']:.1f}")
    facts.add_row("speedup", "1.00x", f"{report['speedup']:.2f}x")
    facts.add_row("acceptance length", "1.00", f"{report['acceptance_length']:.2f}")
    positions = " ".join(f"{p:.2f}" for p in report["acceptance_per_position"])
    facts.add_row("accepted per position", "", positions)
    facts.add_row("texts equal", "", str(report["outputs_equal"]))
    console.print(facts)


def _explain(
    console: Console, settings: dict[str, Any], log: Path, off: dict[str, Any], on: dict[str, Any], different: list[int]
) -> None:
    """Say where answers part, and how close the target's two best logits are there."""
    with Worker(TASKS, {"llm": settings}, "speculation off", log=log) as engine:
        for i in different:
            a, b = off["tokens"][i], on["tokens"][i]
            at = next((j for j, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            apart = engine.ask("gap", number=i, answer=a[:at])
            console.print(
                f"texts differ: prompt {QUESTIONS[i]!r}, answer token {at}: {a[at : at + 1]} without, "
                f"{b[at : at + 1]} with Gumiho; the target's two best logits there are {apart:.2e} apart",
                style="red",
                markup=False,
            )
