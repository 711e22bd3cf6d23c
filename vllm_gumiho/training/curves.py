"""Training runs side by side, as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_gumiho.errors import FigureError
from vllm_gumiho.figures import labelled, new_figure, save_figure

_PANELS = (("eval_acceptance_length", "held-out acceptance length"), ("ce_1", "training cross-entropy, first position"))

Curves = dict[str, list[tuple[int, float]]]


def read_curves(folders: list[Path], labels: list[str]) -> list[tuple[str, Curves]]:
    """Of each finished run, ``(step, value)`` of the panels' quantities.  A label names a run, by default its folder.

    Raises: FigureError for a folder without a finished run's ``trainer_state.json``, or labels that do not fit.
    """
    found = []
    for folder, label in zip(folders, labelled(labels, [folder.name for folder in folders], "runs"), strict=True):
        file = folder / "final" / "trainer_state.json"
        try:
            history = json.loads(file.read_bytes())["log_history"]
            curves = {
                # The last measurement is made twice, at the last step and at the end.
                name: sorted({int(e["step"]): float(e[name]) for e in history if name in e}.items())
                for name, _ in _PANELS
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FigureError(
                f"{file}: no state of a finished run ({error!r}); give the --output of 'vllm-gumiho train'"
            ) from error
        if not all(curves.values()):
            raise FigureError(f"{file}: no measurements in it; train for longer than one --save-every")
        found.append((label, curves))
    return found


def plot_curves(runs: list[tuple[str, Curves]], output: Path) -> None:
    """Write a PNG with a panel a quantity, over optimizer steps.

    Raises: FigureError without matplotlib, or when the file cannot be written.
    """
    figure = new_figure()
    for axis, (name, title) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        for label, curves in runs:
            steps, values = zip(*curves[name], strict=True)
            axis.plot(steps, values, marker="o", markersize=3, label=label)
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    save_figure(figure, output)
