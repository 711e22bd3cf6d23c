"""Measures with real engines what drafting costs and brings, and makes one record of it."""

from __future__ import annotations

import datetime
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gumiho.errors import TuningError
from vllm_gumiho.request.lengths import SCHEDULE, TOKENS
from vllm_gumiho.tuning.engine import MeasuringEngine
from vllm_gumiho.tuning.schedule import Costs, choose, row_cost
from vllm_gumiho.tuning.settings import Plan
from vllm_gumiho.tuning.storage import FORMAT
from vllm_gumiho.tuning.theory import conditional

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

Note = Callable[[str], None]
MODEL_LENGTH = 1024
TOGETHER, ONE, EACH = "off and on side by side", "one engine for all K", "an engine for each K"
PASSED_ON = (
    "tokenizer", "tokenizer_mode", "revision", "tokenizer_revision", "trust_remote_code", "dtype", "quantization",
    "kv_cache_dtype", "block_size", "enforce_eager", "tensor_parallel_size", "gpu_memory_utilization", "load_format",
    "download_dir", "config_format", "hf_overrides", "distributed_executor_backend", "disable_custom_all_reduce",
)  # fmt: skip


def engine_settings(engine: EngineArgs, target: ModelConfig, max_batch: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for a measuring engine: the user's that change speed or are needed to load the model."""
    settings: dict[str, Any] = {"model": target.model}
    for name in PASSED_ON:
        value = getattr(engine, name, None)
        if value is not None and isinstance(value, (str, int, float, bool, dict)) and is_json(value):
            settings[name] = value
    return settings | {
        "max_model_len": min(MODEL_LENGTH, target.max_model_len),
        "max_num_seqs": max_batch,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }


def measure(
    settings: dict[str, Any], speculative: dict[str, Any], most: int, plan: Plan, mode: str, note: Note
) -> dict[str, Any]:
    """Times and acceptance: the ``measurement`` of a record.

    settings: of `engine_settings`.  speculative: a complete speculative config except for the lengths.  most: the
    largest K.  mode: of `mode_for`.  note: takes lines of progress.

    Raises: EngineError when an engine fails, TuningError when it drafts nothing.
    """
    begun = time.perf_counter()
    off: dict[str, list[float]] = {str(batch): [] for batch in plan.batches}
    on: dict[str, dict[str, list[float]]] = {str(k): {str(b): [] for b in plan.batches} for k in range(most + 1)}
    accepted: dict[str, Any] = {}

    def cell(engine: MeasuringEngine, row: dict[str, list[float]], batch: int, length: int, switch: bool) -> None:
        note(f"K={length}, batch size {batch}, time {len(row[str(batch)]) + 1} of {plan.repeats}")
        row[str(batch)].append(engine.ask("step", batch=batch, length=length, switch=switch, seconds=plan.seconds))

    def start(arguments: dict[str, Any]) -> MeasuringEngine:
        return MeasuringEngine(arguments, max(0.0, plan.limit_s - (time.perf_counter() - begun)))

    def drafting(group: list[int]) -> MeasuringEngine:
        # The longest at every batch size.  The others stand behind: kernels are chosen for the lengths of a schedule.
        others = enumerate(group[:-1], plan.max_batch + 1)
        schedule = [[1, plan.max_batch, group[-1]], *([size, size, length] for size, length in others)]
        config = {**speculative, TOKENS: most, SCHEDULE: schedule}
        return start({**settings, "speculative_config": config})

    def off_cells(repeats: int) -> str:
        with start(settings) as engine:
            for _, batch in itertools.product(range(repeats), plan.batches):
                cell(engine, off, batch, 0, False)
            return str(engine.started["model_runner"])

    note("starting")
    if mode == TOGETHER:
        with start(settings) as plain, drafting(list(range(most + 1))) as engine:
            runner = str(engine.started["model_runner"])
            accepted = engine.ask("acceptance", tokens=plan.tokens)
            for _, batch in itertools.product(range(plan.repeats), plan.batches):
                cell(plain, off, batch, 0, False)
                for length in range(most + 1):
                    cell(engine, on[str(length)], batch, length, True)
    else:
        runner = off_cells((plan.repeats + 1) // 2)
        for group in [list(range(most + 1))] if mode == ONE else [[length] for length in range(most + 1)]:
            with drafting(group) as engine:
                if most in group:
                    accepted = engine.ask("acceptance", tokens=plan.tokens)
                for _, batch, length in itertools.product(range(plan.repeats), plan.batches, group):
                    cell(engine, on[str(length)], batch, length, len(group) > 1)
        off_cells((plan.repeats + 1) // 2)
    if not accepted["drafts"]:
        raise TuningError("the engine drafted nothing while acceptance was measured; its prompts ended at once")
    return {
        "off_ms": off,
        "on_ms": on,
        "drafts": accepted["drafts"],
        "accepted": accepted["accepted"][:most],
        "runner": runner,
        "mode": mode,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def mode_for(target: str, eager: bool) -> str:
    """How engines can be measured here: `TOGETHER`, `ONE` or `EACH`.

    On a CPU with room for both, the engine without speculation and the one with it are kept side by side and take
    turns, so that the machine's own changes meet both alike.  Elsewhere they follow each other, with off once before
    and once after.  CUDA graphs are recorded for one K: each K then needs an engine of its own.
    """
    import psutil
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return ONE if eager else EACH
    weights = sum(file.stat().st_size for file in Path(target).glob("*.safetensors")) if Path(target).is_dir() else 0
    room = psutil.virtual_memory().available
    return TOGETHER if weights and room > 2 * (3 * weights + 3 * 2**30) else ONE


def costs_of(measurement: dict[str, Any]) -> Costs:
    """Times of the quietest repeat, and conditional accuracies.

    Other work on the machine only ever adds time.  So the least of the repeats' medians counts, and a time that is
    above that of a larger batch, of more drafts, or (for off) of any drafting is noise and is brought down to it.
    """
    marginal = [count / measurement["drafts"] for count in measurement["accepted"]]
    rows = [_quietest(measurement["off_ms"])]
    rows += [_quietest(measurement["on_ms"][str(length)]) for length in range(len(measurement["on_ms"]))]
    least = [
        {batch: min(ms for later in rows[number:] for size, ms in later.items() if size >= batch) for batch in row}
        for number, row in enumerate(rows)
    ]
    return Costs(least[0], dict(enumerate(least[1:])), conditional(marginal))


def record_of(key: dict[str, Any], measurement: dict[str, Any], most: int, plan: Plan) -> dict[str, Any]:
    """What is stored: the identity, the choice, the expected speeds behind it and the raw times."""
    costs = costs_of(measurement)
    choice = choose(costs, plan.margin, plan.max_loss)
    expected = [
        {
            "batch": size,
            "off_tokens_per_s": round(costs.speed(None, size), 2),
            "tokens_per_s": {str(length): round(costs.speed(length, size), 2) for length in sorted(costs.on)},
        }
        for size in costs.sizes
    ]
    return {
        "format": FORMAT,
        "key": key,
        "measured": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "most": most,
        "schedule": choice.schedule,
        "single": choice.single,
        "reason": choice.reason,
        "above": choice.above,
        "margin": plan.margin,
        "max_loss": plan.max_loss,
        "acceptance": [round(p, 4) for p in costs.acceptance],
        "row_cost": round(row_cost(costs), 6),
        "expected": expected,
        "measurement": measurement,
    }


def _quietest(row: dict[str, list[float]]) -> dict[int, float]:
    return {int(batch): min(times) for batch, times in row.items()}


def is_json(value: Any) -> bool:
    """Whether a value can be handed to a measuring process."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
