"""Training runs of tests: small settings, and the losses of one."""

from __future__ import annotations

from pathlib import Path

from vllm_gumiho.training.objective import Objective
from vllm_gumiho.training.recipe import Recipe
from vllm_gumiho.training.recipes import objective_of


def recipe(target: Path | str, data: Path | str, output: Path | str, **changes) -> Recipe:
    small = {
        "steps": 4,
        "save_every": 2,
        "rows": 2,
        "row_length": 64,
        "eval_rows": 2,
        "held_out": 0.1,
        "bf16": False,
        "candidates": 32,
        "frequent": 16,
        "extra": {"disable_tqdm": True, "report_to": []},
    }
    return Recipe(target=str(target), data=[str(data)], output=str(output), **(small | changes))


def unrolled(**changes) -> Objective:
    """Losses of the recipe of that name, heads steering the Transformer or not as it says."""
    return objective_of(Recipe("target", ["data"], "run", recipe="unrolled", **changes))
