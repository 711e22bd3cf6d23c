"""Reading what `vllm-gumiho plan` is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_gumiho.errors import TuningError
from vllm_gumiho.tuning.theory import StepTimes, conditional

TIMES = ("target", "verify", "serial", "heads")


def numbers(text: str, option: str) -> list[float]:
    """Comma-separated numbers.  Raises: TuningError naming the option."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise TuningError(f"{option} {text!r}: give numbers with commas between, such as .7,.6,.5") from None


def step_times(given: str) -> StepTimes:
    """Milliseconds: four numbers, or a JSON file ``{"target", "verify", "serial", "heads"}``.  Raises: TuningError."""
    path = Path(given)
    if not path.is_file() and not given.strip().endswith(".json"):
        values = numbers(given, "--step-times")
        if len(values) != len(TIMES):
            raise TuningError(f"--step-times {given!r}: give four numbers in ms, {', '.join(TIMES)}, or a JSON file")
        return StepTimes(*values)
    content = _json(path)
    if not isinstance(content, dict) or set(content) != set(TIMES):
        raise TuningError(f"{path}: expected a JSON object of milliseconds with the keys {', '.join(TIMES)}")
    return StepTimes(**content)


def accuracies(path: Path) -> list[float]:
    """Conditional accuracies from a report of ``vllm-gumiho eval`` or ``tune``.

    An eval report may hold several runs: the greedy one that drafts most tokens is taken, its mean over the sets.
    Raises: TuningError.
    """
    content = _json(path)
    if isinstance(content, dict) and isinstance(content.get("runs"), list):
        runs = [run for run in content["runs"] if isinstance(run, dict) and _marginal(run.get("mean"))]
        runs = sorted(runs, key=lambda run: (run.get("temperature", 0) != 0, -len(_marginal(run["mean"]) or [])))
        content = runs[0]["mean"] if runs else None
    marginal = _marginal(content)
    if marginal:
        return conditional(marginal)
    if isinstance(content, dict):
        for name in ("conditional_accuracy_per_position", "acceptance"):
            values = content.get(name)
            if isinstance(values, list) and values:
                return [0.0 if value is None else value for value in values]
    raise TuningError(
        f"{path}: no acceptance per position in it; give the JSON report of vllm-gumiho eval or tune, or --acceptance"
    )


def rank_hits(path: Path) -> list[list[float]]:
    """``[K][ranks]``: how often each choice is right, given that all before were, from an eval report.

    Of the greedy run that drafts most tokens, mean over its sets; positions behind the last that was reached are left
    out.  Raises: TuningError.
    """
    content = _json(path)
    runs = content.get("runs") if isinstance(content, dict) else None
    means = [run["mean"] | {"T": run.get("temperature", 0)} for run in runs or () if isinstance(run.get("mean"), dict)]
    means = [mean for mean in means if isinstance(mean.get("rank_hits"), dict)]
    if not means:
        raise TuningError(f"{path}: no rank hits in it; make the report with vllm-gumiho eval --rank-hits")
    best = min(means, key=lambda mean: (mean["T"] != 0, -len(mean["rank_hits"]["rates"])))
    rates = best["rank_hits"]["rates"]
    reached = next((i for i, ranks in enumerate(rates) if None in ranks), len(rates))
    return [[float(rate) for rate in ranks] for ranks in rates[:reached]]


def _marginal(content: Any) -> list[float] | None:
    values = content.get("acceptance_per_position") if isinstance(content, dict) else None
    if not isinstance(values, list) or not all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in values):
        return None
    return values


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TuningError(f"{path}: cannot be read as JSON ({error})") from error
