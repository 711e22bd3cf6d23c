"""Plots of a benchmark, as PNG files: speedup, acceptance, and where the time of a step goes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from vllm_gumiho.evaluation.plot import plot_acceptance
from vllm_gumiho.figures import MARKERS, new_figure, save_figure

PARTS = ("verify", "draft", "rest")


def plot_all(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots that the report has figures for; their paths.

    Raises: FigureError without matplotlib, or when a file cannot be written.
    """
    rows = [row for row in report["summary"] if "output_tokens_per_s" in row]
    drawn = []
    for name, draw in (("speedup", _speedup), ("acceptance", _acceptance), ("step", _step)):
        file = folder / f"{name}.png"
        if draw(rows, report["assumed"], file):
            drawn.append(file)
    return drawn


def _speedup(rows: list[dict[str, Any]], assumed: str, file: Path) -> bool:
    modes = list(dict.fromkeys(row["mode"] for row in rows if row["speedup"] is not None))
    if not modes:
        return False
    figure = new_figure(5.5 * len(modes))
    for axis, mode in zip(figure.subplots(1, len(modes), sharey=True, squeeze=False)[0], modes, strict=True):
        of_mode = [row for row in rows if row["mode"] == mode and row["speedup"] is not None]
        for index, label in enumerate(dict.fromkeys(row["label"] for row in of_mode)):
            line = [row for row in of_mode if row["label"] == label]
            middle = [row["speedup"] for row in line]
            spread = [
                [row["speedup"] - row["speedup_range"][0] for row in line],
                [row["speedup_range"][1] - row["speedup"] for row in line],
            ]
            style = (
                {"color": "black", "linestyle": "--"} if label == "off" else {"marker": MARKERS[index % len(MARKERS)]}
            )
            axis.errorbar([row["concurrency"] for row in line], middle, yerr=spread, capsize=3, label=label, **style)
        sizes = sorted({row["concurrency"] for row in of_mode})
        axis.set(title=mode, xlabel="requests at once", xscale="log", ylim=(0, None))
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("output tokens/s over no speculation")
    figure.axes[0].legend(fontsize="small")
    _caption(figure, assumed)
    save_figure(figure, file)
    return True


def _acceptance(rows: list[dict[str, Any]], assumed: str, file: Path) -> bool:
    drafting = [row for row in rows if row["method"] != "none" and row["acceptance_per_position"]]
    # Assumed acceptance is no result.
    if not drafting or assumed:
        return False
    # Acceptance hardly depends on mode and load: one line a variant, from its first row.
    runs: dict[str, dict[str, Any]] = {}
    for row in drafting:
        rates = [1.0, *row["acceptance_per_position"]]
        conditional = [now / before if before else None for before, now in itertools.pairwise(rates)]
        runs.setdefault(row["label"], {"mean": {**row, "conditional_accuracy_per_position": conditional}})
    plot_acceptance(list(runs.items()), file)
    return True


def _step(rows: list[dict[str, Any]], assumed: str, file: Path) -> bool:
    timed = [row for row in rows if row["step_ms"]]
    if not timed:
        return False
    figure = new_figure(max(6.0, 0.8 * len(timed) + 2))
    axis = figure.subplots()
    names = [f"{row['label']}\n{row['concurrency']} at once" for row in timed]
    bottom = [0.0] * len(timed)
    for part in PARTS:
        heights = [row["step_ms"][part] for row in timed]
        axis.bar(names, heights, bottom=bottom, label=part)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axis.set(ylabel="ms a decoding step, profiler on")
    axis.tick_params(axis="x", labelsize="x-small")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize="small")
    _caption(figure, assumed)
    save_figure(figure, file)
    return True


def _caption(figure: Any, caption: str) -> None:
    if caption:
        figure.suptitle(caption, fontsize="x-small", wrap=True)
