"""Plots of a plan and of a verified schedule, as PNG files."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_gumiho.figures import MARKERS, new_figure, save_figure
from vllm_gumiho.tuning.theory import Option
from vllm_gumiho.tuning.verify import gains_of


def plot_plan(found: Sequence[Option], output: Path) -> None:
    """Expected accepted tokens and tokens/s against K, a line for each number of serial steps.

    Raises: FigureError without matplotlib, or when the file cannot be written.
    """
    figure = new_figure()
    left, right = figure.subplots(1, 2, sharex=True)
    off = found[0]
    for serial in sorted({option.serial for option in found[1:]}):
        line = [option for option in found[1:] if option.serial == serial]
        lengths = [option.length for option in line]
        left.plot(lengths, [option.accepted for option in line], marker="o", label=f"{serial} serial")
        right.plot(lengths, [option.tokens_per_s for option in line], marker="o", label=f"{serial} serial")
    right.axhline(off.tokens_per_s, color="black", linestyle="--", label="no speculation")
    left.set(xlabel="K, draft tokens a step", ylabel="expected accepted tokens")
    right.set(xlabel="K, draft tokens a step", ylabel="expected tokens/s")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    right.legend(fontsize="small")
    save_figure(figure, output)


def plot_curve(curve: dict[str, Any], title: str, output: Path) -> None:
    """Measured tokens/s against concurrency, median and range, and the median ratio over no speculation by rounds.

    curve: ``{name: {concurrency: [tokens/s of each run]}}`` with a line named ``off``.
    Raises: FigureError without matplotlib, or when the file cannot be written.
    """
    figure = new_figure()
    left, right = figure.subplots(1, 2, sharex=True)
    for (name, line), marker in zip(curve.items(), MARKERS, strict=False):
        sizes = [int(size) for size in line]
        middle = [statistics.median(runs) for runs in line.values()]
        spread = [
            [m - min(runs) for m, runs in zip(middle, line.values(), strict=True)],
            [max(runs) - m for m, runs in zip(middle, line.values(), strict=True)],
        ]
        left.errorbar(sizes, middle, yerr=spread, marker=marker, capsize=3, label=name, alpha=0.8)
        gains = gains_of(curve, name)
        right.plot(list(gains), list(gains.values()), marker=marker, label=name)
    left.set(xlabel="requests at once", ylabel="measured output tokens/s")
    right.set(xlabel="requests at once", ylabel="over no speculation")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks([int(size) for size in curve["off"]], list(curve["off"]))
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    left.legend(fontsize="small")
    figure.suptitle(title, fontsize="small")
    save_figure(figure, output)
