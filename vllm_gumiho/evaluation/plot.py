"""Acceptance per position of several runs, as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_gumiho.errors import EvalError
from vllm_gumiho.evaluation.report import run_title
from vllm_gumiho.figures import MARKERS, labelled, new_figure, save_figure

_PANELS = (
    ("acceptance_per_position", "accepted up to this position"),
    ("conditional_accuracy_per_position", "accepted, given that the one before was"),
)


def read_runs(
    files: list[Path], labels: list[str], lengths: list[int], temperatures: list[float]
) -> list[tuple[str, dict[str, Any]]]:
    """Runs that draft, with a label each, out of the judge's reports; filtered where lengths or temperatures are given.

    A label names a file (its stem by default); method, K and T are added where the file gives more than one run.

    Raises: EvalError for a file that is no report, one without such a run, or labels that do not fit.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for file, label in zip(files, labelled(labels, [file.stem for file in files], "reports"), strict=True):
        try:
            report = json.loads(file.read_bytes())
            runs = [
                run
                for run in report["runs"]
                if run["method"] != "none"
                and (not lengths or run["num_speculative_tokens"] in lengths)
                and (not temperatures or run["temperature"] in temperatures)
            ]
            for run in runs:
                for name, _ in _PANELS:
                    run["mean"][name] = [None if value is None else float(value) for value in run["mean"][name]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise EvalError(
                f"{file}: no report of 'vllm-gumiho eval' ({error!r}); make one with --output FILE"
            ) from error
        if not runs:
            raise EvalError(f"{file}: it has no run that drafts with the K and temperature asked for; ask for others")
        found += [(label if len(runs) == 1 else f"{label}, {run_title(run)}", run) for run in runs]
    return found


def plot_ranks(runs: list[tuple[str, dict[str, Any]]], output: Path) -> None:
    """Write a PNG with a panel a run: how often the target's token is each choice, by position, one upon the other.

    Raises: EvalError for a run without rank hits; FigureError without matplotlib, or when the file cannot be written.
    """
    for label, run in runs:
        if "rank_hits" not in run["mean"]:
            raise EvalError(f"{label}: its run has no rank hits; make the report with --rank-hits")
    figure = new_figure()
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axis, (label, run) in zip(panels, runs, strict=True):
        rates = [[rate or 0.0 for rate in ranks] for ranks in run["mean"]["rank_hits"]["rates"]]
        positions, below = range(1, len(rates) + 1), [0.0] * len(rates)
        for rank in range(len(rates[0])):
            heights = [ranks[rank] for ranks in rates]
            axis.bar(positions, heights, bottom=below, label=f"{rank + 1}")
            below = [a + b for a, b in zip(below, heights, strict=True)]
        axis.set(title=label, xlabel="draft position", ylim=(0, 1))
        axis.set_xticks(positions)
    panels[0].set_ylabel("of drafts right up to the position before")
    panels[-1].legend(title="choice", fontsize="small")
    save_figure(figure, output)


def plot_acceptance(runs: list[tuple[str, dict[str, Any]]], output: Path) -> None:
    """Write a PNG with two panels, cumulative and conditional acceptance per position, mean over the sets.

    Raises: FigureError without matplotlib, or when the file cannot be written.
    """
    figure = new_figure()
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, (name, title) in zip(axes, _PANELS, strict=True):
        for index, (label, run) in enumerate(runs):
            values = run["mean"][name]
            heights = [float("nan") if value is None else value for value in values]
            length = f"{label} ({run['mean']['acceptance_length']:.2f})"
            axis.plot(range(1, len(values) + 1), heights, marker=MARKERS[index % len(MARKERS)], label=length)
        axis.set(title=title, xlabel="draft position", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of drafts, mean over sets")
    axes[0].set_xticks(range(1, max(len(run["mean"][_PANELS[0][0]]) for _, run in runs) + 1))
    axes[0].legend(title="run (acceptance length)", fontsize="small")
    save_figure(figure, output)
