"""Real tokens/s at several concurrencies, and what becomes of a schedule that does not bring what was expected."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any

from vllm_gumiho.errors import EngineError, TuningError
from vllm_gumiho.request.lengths import SCHEDULE, TOKENS
from vllm_gumiho.request.per_request import CONFIDENT, PER_REQUEST
from vllm_gumiho.tuning.engine import MeasuringEngine
from vllm_gumiho.tuning.measure import TOGETHER, Note, costs_of
from vllm_gumiho.tuning.schedule import confident_schedule, gains_in_words, loss_above, refusal
from vllm_gumiho.tuning.settings import Plan

WARM_TOKENS = 2
# The processes of the engine that had its turn look for work for one second more before they leave the cores.
REST_S = 1.2
Curve = dict[str, dict[str, list[float]]]


def verified(
    record: dict[str, Any], settings: dict[str, Any], speculative: dict[str, Any], plan: Plan, mode: str, note: Note
) -> dict[str, Any]:
    """The record with the measured ``verified`` curve, and without its schedule where that loses: see `judged`.

    settings, speculative: of `measure.measure`.  What was measured is not lost when an engine fails, or when both take
    more than ``plan.limit_s``: the schedule is then withdrawn as one that could not be verified.
    """
    most, schedule = record["most"], record["schedule"]
    configs: dict[str, dict[str, Any] | None] = {"off": None}
    if plan.fixed:
        configs[f"K={most}"] = {**speculative, TOKENS: most}
    if schedule is not None:
        configs["schedule"] = {**speculative, TOKENS: max(length for *_, length in schedule), SCHEDULE: schedule}
    by_request = record["measurement"]["runner"] == "V1"
    costs = costs_of(record["measurement"])
    confident = confident_schedule(costs) if by_request else None
    if confident is not None:
        lengths = {TOKENS: max(length for *_, length in confident), SCHEDULE: confident}
        configs[CONFIDENT] = {**speculative, **lengths, PER_REQUEST: record["row_cost"]}
    if len(configs) == 1:
        return record
    try:
        curve = measure_curve(settings, configs, plan, mode, note, plan.limit_s - record["measurement"]["seconds"])
    except (TuningError, EngineError) as error:
        return _withdrawn(record, f"it could not be verified: {error}")
    return judged(record, curve, plan, confident, loss_above(costs, plan.max_loss))


def judged(
    record: dict[str, Any],
    curve: Curve,
    plan: Plan,
    confident: list[list[int]] | None = None,
    above: str | None = None,
) -> dict[str, Any]:
    """The record after its schedule met real requests: ``curve`` is kept as ``verified``.

    confident: schedule of drafts whose length goes by request; it is taken, as ``per_request``, where it gains
    ``plan.margin`` at some concurrency, loses no more than ``plan.max_loss`` at any, and is faster on average than what
    is left.  above: of `schedule.loss_above`, which holds for it too.

    A schedule that loses more than ``plan.max_loss`` at some concurrency, or is slower on average, is taken back: the
    record then says no speculation and why, and keeps it as ``withdrawn``.  Its single K goes too, which the same
    expectations chose.
    """
    record = {**record, "verified": curve}
    best = 1.0
    if record["schedule"] is not None:
        gains = gains_of(curve, "schedule")
        refused = refusal(gains, 0.0, plan.max_loss, "measured")
        if refused is not None:
            record = _withdrawn(record, refused)
        else:
            record = record | {"reason": f"{record['reason']}; {gains_in_words(gains)} measured"}
            best = statistics.geometric_mean(gains.values())
    if confident is None or CONFIDENT not in curve:
        return record
    gains = gains_of(curve, CONFIDENT)
    if refusal(gains, plan.margin, plan.max_loss) or statistics.geometric_mean(gains.values()) <= best:
        return record
    reason = f"drafts of a length by request: {gains_in_words(gains)} measured"
    return record | {"schedule": confident, "per_request": record["row_cost"], "reason": reason, "above": above}


def _withdrawn(record: dict[str, Any], why: str) -> dict[str, Any]:
    if record["schedule"] is None:
        return record
    off = {"schedule": None, "single": 0, "above": None, "withdrawn": record["schedule"]}
    return record | off | {"reason": f"{record['reason']}; {why}"}


def gains_of(curve: Curve, name: str) -> dict[int, float]:
    """Concurrency to tokens/s of a line over those of "off" in the same round, the median of rounds."""
    return {
        int(size): statistics.median(a / b for a, b in zip(rounds, curve["off"][size], strict=True))
        for size, rounds in curve[name].items()
    }


def measure_curve(
    settings: dict[str, Any],
    configs: dict[str, dict[str, Any] | None],
    plan: Plan,
    mode: str,
    note: Note,
    limit_s: float,
) -> Curve:
    """``{name: {concurrency: [output tokens/s of each round]}}`` of engines with these speculative configs.

    settings: arguments of `vllm.LLM`, the same that the schedule is stored for.  mode: of `measure.mode_for`; where
    engines fit side by side they take turns, elsewhere they follow each other, in every other round backwards.

    Raises: EngineError when an engine fails, or when all takes more than ``limit_s`` seconds.
    """
    begun = time.perf_counter()
    curve: Curve = {name: {str(batch): [] for batch in plan.batches} for name in configs}

    def start(stack: contextlib.ExitStack, name: str) -> MeasuringEngine:
        note(f"starting {name}")
        left = max(0.0, limit_s - (time.perf_counter() - begun))
        arguments = {**settings, "speculative_config": configs[name]}
        engine = stack.enter_context(MeasuringEngine(arguments, left, serving=True))
        for batch in plan.batches:
            engine.ask("throughput", batch=batch, tokens=WARM_TOKENS)
        return engine

    def run(engine: MeasuringEngine, name: str, batch: int) -> None:
        note(f"{name}, {batch} at once")
        time.sleep(REST_S)
        curve[name][str(batch)].append(engine.ask("throughput", batch=batch, tokens=plan.answer_tokens))

    if mode == TOGETHER:
        with contextlib.ExitStack() as stack:
            engines = {name: start(stack, name) for name in configs}
            for _ in range(plan.rounds):
                for batch in plan.batches:
                    for name, engine in engines.items():
                        run(engine, name, batch)
        return curve
    for number in range(plan.rounds):
        for name in list(configs)[:: -1 if number % 2 else 1]:
            with contextlib.ExitStack() as stack:
                engine = start(stack, name)
                for batch in plan.batches:
                    run(engine, name, batch)
    return curve
