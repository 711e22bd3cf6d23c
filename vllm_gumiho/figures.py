"""Pictures: a matplotlib figure without a window, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_gumiho.errors import FigureError
from vllm_gumiho.files import whole

MARKERS = "osD^vPX*"


def new_figure(width: float = 11) -> Any:
    """An empty figure, ``width`` by 4.5 inches.  Raises: FigureError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FigureError("plots need matplotlib, which is not installed; pip install 'vllm-gumiho[eval]'") from error
    return Figure(figsize=(width, 4.5), layout="constrained")


def save_figure(figure: Any, output: Path) -> None:
    """Write a PNG.  Raises: FigureError when it cannot be written."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole(output) as part:
            figure.savefig(part, format="png", dpi=120)
    except OSError as error:
        raise FigureError(f"{output}: cannot be written ({error.strerror or error}); give another path") from error


def labelled(labels: list[str], names: list[str], what: str) -> list[str]:
    """A label for each of ``what``, by default its name.  Raises: FigureError for another number of labels."""
    if labels and len(labels) != len(names):
        raise FigureError(f"--labels: {len(labels)} labels for {len(names)} {what}; give one for each, in their order")
    return labels or names
