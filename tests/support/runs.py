"""Training runs of tests: small settings, and the losses of one."""

from __future__ import annotations

import json
import random
from pathlib import Path

from vllm_gumiho.training.data import PackedRows, read_samples, split_held_out
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


def logged(target: Path | str, data: Path | str, output: Path | str, **changes) -> Recipe:
    """Three steps, each logged, on the CPU."""
    extra = {"disable_tqdm": True, "report_to": [], "logging_steps": 1, "use_cpu": True}
    return recipe(target, data, output, **({"steps": 3, "extra": extra} | changes))


def write_answers(folder: Path) -> Path:
    """A file of forty conversations of two turns, whose answers count up."""
    rng = random.Random(0)
    lines = []
    for i in range(40):
        start = rng.randrange(2, 100)
        turns = [
            {"prompt": [rng.randrange(2, 150) for _ in range(5)], "answer": [start + j for j in range(12)]},
            {"prompt": [3, 4], "answer": [start + 20 + j for j in range(6)]},
        ]
        lines.append(json.dumps({"id": f"s{i}", "turns": turns}))
    file = folder / "answers.jsonl"
    file.write_text("\n".join(lines))
    return file


def train_rows(settings: Recipe) -> PackedRows:
    """The rows that a run of these settings trains on, in the order of the conversations."""
    samples = read_samples([Path(settings.data[0])], 160)
    return PackedRows(split_held_out(samples, settings.held_out, 0)[0], settings.row_length)


def unrolled(**changes) -> Objective:
    """Losses of the recipe of that name, heads steering the Transformer or not as it says."""
    return objective_of(Recipe("target", ["data"], "run", recipe="unrolled", **changes))
