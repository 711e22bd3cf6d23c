"""A judgement on the terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vllm_gumiho.request.lengths import AUTO, TOKENS


def run_title(run: dict[str, Any]) -> str:
    """Method, K and (of a finished run) temperature."""
    asked = run["num_speculative_tokens"]
    if (run.get("speculative_config") or {}).get(TOKENS) == AUTO:
        asked = AUTO
    title = "no speculation" if run["method"] == "none" else f"{run['method']} K={asked}"
    return f"{title} T={run['temperature']:g}" if "temperature" in run else title


def set_line(run: dict[str, Any], name: str, one: dict[str, Any]) -> str:
    """One line on a set just finished."""
    line = f"{run_title(run)} {name}: {one['prompts']} prompts, {one['output_tokens']} tokens, {one['seconds']:.1f} s"
    return line if run["method"] == "none" else f"{line}, acceptance length {one['acceptance_length']:.3f}"


def show(console: Console, run: dict[str, Any]) -> None:
    """Table of a run: a row a set, their mean, conditional accuracy; then every prompt whose output differs."""
    drafts = run["method"] != "none"
    positions = [str(i + 1) for i in range(run["num_speculative_tokens"])]
    columns = ["tokens", "tok/s", *(["length", *positions, "equal"] if drafts else [])]
    caption = (
        "length: 1 + accepted / drafts; 1, 2, ...: share of drafts accepted up to that position" if drafts else None
    )
    table = Table(
        title=f"{run_title(run)}, {run['mean']['prompts']} prompts",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=caption,
    )
    table.add_column("set")
    for column in columns:
        table.add_column(column, justify="right")
    for name, one in (*run["sets"].items(), ("mean", run["mean"])):
        if name == "mean":
            table.add_section()
        cells = [name, str(one["output_tokens"]), f"{one['output_tokens_per_s']:.1f}"]
        if drafts:
            equal = "" if one["equal"] is None else f"{one['equal']}/{one['prompts']}"
            cells += [f"{one['acceptance_length']:.3f}", *map(_rate, one["acceptance_per_position"]), equal]
        table.add_row(*cells)
    if drafts:
        table.add_row("conditional", "", "", "", *map(_rate, run["mean"]["conditional_accuracy_per_position"]), "")
    console.print(table)
    if drafts:
        mean = run["mean"]
        console.print(
            f"{mean['drafts']:,} drafts, {mean['draft_tokens']:,} tokens sent to verification, "
            f"{mean['accepted_tokens']:,} accepted",
            highlight=False,
        )
    if "rank_hits" in run["mean"]:
        _show_ranks(console, run["mean"]["rank_hits"])
    for name, one in run["sets"].items():
        for found in one["different"]:
            console.print(
                f"{name}: {found['id']} differs from speculation off in turn {found['turn']} at token "
                f"{found['position']}: {found['off']} without, {found['on']} with",
                style="red",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


def _show_ranks(console: Console, found: dict[str, Any]) -> None:
    """A row a position: how often the target's token was each rank, mean over the sets."""
    table = Table(title="rank of the target's token, where all before were right", box=SIMPLE, pad_edge=False)
    for column in ("position", *(str(rank + 1) for rank in range(len(found["rates"][0]))), "drafts"):
        table.add_column(column, justify="right")
    for position, (rates, reached) in enumerate(zip(found["rates"], found["reached"], strict=True), 1):
        table.add_row(str(position), *map(_rate, rates), str(reached))
    console.print(table)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}".removeprefix("0")
