"""Real tokens/s at several concurrencies, and what becomes of a schedule that does not bring what was expected."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any

from vllm_gumiho.tuning.engine import MeasuringEngine
from vllm_gumiho.tuning.measure import TOGETHER, Note, Plan
from vllm_gumiho.tuning.schedule import gains_in_words, refusal

Curve = dict[str, dict[str, list[float]]]


def verified(
    record: dict[str, Any], settings: dict[str, Any], speculative: dict[str, Any], plan: Plan, mode: str, note: Note
) -> dict[str, Any]:
    """The record with the measured ``verified`` curve, and without its schedule where that loses: see `judged`.

    settings, speculative: of `measure.measure`.  Raises: TuningError when an engine fails.
    """
    most, schedule = record["most"], record["schedule"]
    configs: dict[str, dict[str, Any] | None] = {"off": None}
    if plan.fixed:
        configs[f"K={most}"] = {**speculative, "num_speculative_tokens": most}
    if schedule is not None:
        lengths = {
            "num_speculative_tokens": max(length for *_, length in schedule),
            "num_speculative_tokens_per_batch_size": schedule,
        }
        configs["schedule"] = {**speculative, **lengths}
    if len(configs) == 1:
        return record
    return judged(record, measure_curve(settings, configs, plan, mode, note), plan)


def judged(record: dict[str, Any], curve: Curve, plan: Plan) -> dict[str, Any]:
    """The record after its schedule met real requests: ``curve`` is kept as ``verified``.

    A schedule that loses more than ``plan.max_loss`` at some concurrency, or is slower on average, is taken back: the
    record then says no speculation and why, and keeps it as ``withdrawn``.  Its single K goes too, which the same
    expectations chose.
    """
    record = {**record, "verified": curve}
    if record["schedule"] is None:
        return record
    gains = gains_of(curve, "schedule")
    refused = refusal(gains, 0.0, plan.max_loss, "measured")
    if refused is not None:
        off = {"schedule": None, "single": 0, "above": None, "withdrawn": record["schedule"]}
        return record | off | {"reason": f"{record['reason']}; {refused}"}
    return record | {"reason": f"{record['reason']}; {gains_in_words(gains)} measured"}


def gains_of(curve: Curve, name: str) -> dict[int, float]:
    """Concurrency to median tokens/s of a line over that of "off"."""
    return {
        int(size): statistics.median(rounds) / statistics.median(curve["off"][size])
        for size, rounds in curve[name].items()
    }


def measure_curve(
    settings: dict[str, Any], configs: dict[str, dict[str, Any] | None], plan: Plan, mode: str, note: Note
) -> Curve:
    """``{name: {concurrency: [output tokens/s of each round]}}`` of engines with these speculative configs.

    settings: arguments of `vllm.LLM`, the same that the schedule is stored for.  mode: of `measure.mode_for`; where
    engines fit side by side they take turns, elsewhere they follow each other in each round.

    Raises: TuningError when an engine fails, or when it takes more than ``plan.limit_s``.
    """
    begun = time.perf_counter()
    curve: Curve = {name: {str(batch): [] for batch in plan.batches} for name in configs}

    def start(stack: contextlib.ExitStack, name: str) -> MeasuringEngine:
        note(f"starting {name}")
        left = max(0.0, plan.limit_s - (time.perf_counter() - begun))
        engine = stack.enter_context(MeasuringEngine({**settings, "speculative_config": configs[name]}, left))
        engine.ask("throughput", batch=1, tokens=plan.answer_tokens)
        return engine

    def run(engine: MeasuringEngine, name: str, batch: int) -> None:
        note(f"{name}, {batch} at once")
        curve[name][str(batch)].append(engine.ask("throughput", batch=batch, tokens=plan.answer_tokens))

    if mode == TOGETHER:
        with contextlib.ExitStack() as stack:
            engines = {name: start(stack, name) for name in configs}
            for _ in range(plan.rounds):
                for batch in plan.batches:
                    for name, engine in engines.items():
                        run(engine, name, batch)
        return curve
    for _ in range(plan.rounds):
        for name in configs:
            with contextlib.ExitStack() as stack:
                engine = start(stack, name)
                for batch in plan.batches:
                    run(engine, name, batch)
    return curve
