"""Real tokens/s at several concurrencies, with speculation off, a fixed K and the schedule."""

from __future__ import annotations

import contextlib
from typing import Any

from vllm_gumiho.tuning.engine import MeasuringEngine
from vllm_gumiho.tuning.measure import TOGETHER, Note

Curve = dict[str, dict[str, list[float]]]


def measure_curve(
    settings: dict[str, Any], speculative: dict[str, Any], most: int, batches: list[int], tokens: int, rounds: int,
    mode: str, note: Note,
) -> Curve:  # fmt: skip
    """``{name: {concurrency: [output tokens/s of each round]}}`` of "off", "K=<most>" and "auto".

    settings: arguments of `vllm.LLM`, the same that the schedule is stored for.  mode: of `measure.mode_for`; where
    engines fit side by side they take turns, elsewhere they follow each other in each round.

    Raises: TuningError when an engine fails.
    """
    configs: dict[str, dict[str, Any] | None] = {
        "off": None,
        f"K={most}": {**speculative, "num_speculative_tokens": most},
        "auto": {**speculative, "num_speculative_tokens": "auto"},
    }
    curve: Curve = {name: {str(batch): [] for batch in batches} for name in configs}

    def start(stack: contextlib.ExitStack, name: str) -> MeasuringEngine:
        note(f"starting {name}")
        engine = stack.enter_context(MeasuringEngine({**settings, "speculative_config": configs[name]}))
        engine.ask("throughput", batch=1, tokens=tokens)
        return engine

    def run(engine: MeasuringEngine, name: str, batch: int) -> None:
        note(f"{name}, {batch} at once")
        curve[name][str(batch)].append(engine.ask("throughput", batch=batch, tokens=tokens))

    if mode == TOGETHER:
        with contextlib.ExitStack() as stack:
            engines = {name: start(stack, name) for name in configs}
            for _ in range(rounds):
                for batch in batches:
                    for name, engine in engines.items():
                        run(engine, name, batch)
        return curve
    for _ in range(rounds):
        for name in configs:
            with contextlib.ExitStack() as stack:
                engine = start(stack, name)
                for batch in batches:
                    run(engine, name, batch)
    return curve
