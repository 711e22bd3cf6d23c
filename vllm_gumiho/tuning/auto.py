"""``"num_speculative_tokens": "auto"``: the stored schedule of a pair on this machine, measured if there is none."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import filelock

from vllm_gumiho.errors import EngineError, StorageError, TuningError
from vllm_gumiho.request.per_request import PER_REQUEST
from vllm_gumiho.request.resolve import Request
from vllm_gumiho.tuning import storage
from vllm_gumiho.tuning.measure import Note, engine_settings, is_json, measure, mode_for, record_of
from vllm_gumiho.tuning.schedule import in_words
from vllm_gumiho.tuning.settings import Plan
from vllm_gumiho.tuning.verify import verified

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

logger = logging.getLogger("vllm.vllm_gumiho")


def settle(request: Request, engine: EngineArgs, target: ModelConfig, parallel: ParallelConfig) -> Request | None:
    """The request with "auto" replaced by lengths, or None to start without speculation.

    Says in one line of the log what was chosen and why.  Where nothing is stored, measures in processes of their own
    (this one must not hold the accelerator yet) and stores the result; when that fails there is a warning and no
    speculation.
    """
    try:
        record = stored_or_measured(request, engine, target)
    except (TuningError, EngineError, OSError) as error:
        logger.warning(
            "Gumiho: no schedule could be measured (%s); the engine starts without speculation. The next start tries "
            "again: vllm-gumiho tune measures beforehand, and a number as num_speculative_tokens needs no measurement",
            error,
        )
        return None
    return apply(record, request, parallel.data_parallel_size, engine.max_num_seqs)


def apply(record: dict[str, Any], request: Request, data_parallel: int, max_num_seqs: int | None) -> Request | None:
    """A record's choice put into the user's request; None for no speculation.

    max_num_seqs: None where the user leaves it to vLLM, whose defaults are above what is measured.

    vLLM drops schedules under data parallelism, where ranks could choose different lengths and wait for each other for
    ever: the one best K for all batch sizes is used there.
    """
    schedule = record["schedule"]
    if data_parallel > 1:
        if not record["single"]:
            logger.info(
                "Gumiho: the engine starts without speculation: data parallelism needs a single K, and none pays at "
                "every batch size by measurement on this machine (%s)",
                record["reason"],
            )
            return None
        logger.info("Gumiho: K=%d at every batch size, as vLLM takes no schedule here", record["single"])
        return request.with_lengths(record["single"])
    if schedule is None:
        logger.info(
            "Gumiho: the engine starts without speculation, by measurement on this machine (%s)", record["reason"]
        )
        return None
    largest = schedule[-1][0] - 1
    if record.get("above") and (max_num_seqs is None or max_num_seqs > largest):
        logger.info(
            "Gumiho: the engine starts without speculation, as more than %d requests at once would be slower with it "
            "(%s); --max-num-seqs %d lets it draft, and vllm-gumiho tune with a larger --concurrency may",
            largest,
            record["above"],
            largest,
        )
        return None
    logger.info("Gumiho: schedule by measurement on this machine: %s (%s)", in_words(schedule), record["reason"])
    chosen = request.with_lengths(max(length for *_, length in schedule), schedule)
    return chosen if record.get("per_request") is None else chosen.with_row_cost(record["per_request"])


def with_measured_row_cost(request: Request, engine: EngineArgs, target: ModelConfig) -> Request:
    """A request for drafts of a length by request, with what a row costs on this machine where that was measured."""
    record = storage.load(storage.identity(request, engine, target))
    if record is None or record.get("row_cost") is None:
        return request
    logger.info("Gumiho: a row of a step costs %.4f of it, by measurement on this machine", record["row_cost"])
    return request.with_row_cost(record["row_cost"])


def stored_or_measured(request: Request, engine: EngineArgs, target: ModelConfig) -> dict[str, Any]:
    """The record of this pair and machine.  Of several processes that need it at once, one measures.

    Raises: TuningError or EngineError when it cannot be measured.
    """
    key = storage.identity(request, engine, target)
    record = storage.load(key)
    if record is not None:
        return record
    try:
        folder = storage.writable_folder()
    except StorageError as error:
        logger.warning("Gumiho: the schedule will not be stored: %s", error)
        return _measure_and_keep(request, engine, target, key)
    lock = filelock.FileLock(folder / f".{storage.path_of(key).name}.lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        logger.info("Gumiho: waiting for another process, which measures this pair")
        lock.acquire()
    try:
        return storage.load(key) or _measure_and_keep(request, engine, target, key)
    finally:
        lock.release()


def _measure_and_keep(request: Request, engine: EngineArgs, target: ModelConfig, key: dict[str, Any]) -> dict[str, Any]:
    plan = Plan(
        max_batch=storage.largest_batch(engine), repeats=2, seconds=0.3, tokens=32, answer_tokens=16, limit_s=1800
    )
    logger.info(
        "Gumiho: no schedule is stored for this pair on this machine; measuring batch sizes up to %d in processes of "
        "their own before the engine starts, once, for some minutes (vllm-gumiho tune does it beforehand)",
        plan.max_batch,
    )
    begun = time.perf_counter()
    try:
        record = measured_record(request, engine, target, key, plan, logger.debug)
    except (TuningError, EngineError, OSError) as error:
        # API servers make this config once more, while the engine loads: they must not measure then.
        storage.leave_to_children(storage.failed(key, request.most, f"nothing was measured: {error}"))
        raise
    try:
        file = str(storage.save(record))
    except StorageError:
        file = "the environment of this process and its children"
        storage.leave_to_children(record)
    logger.info("Gumiho: measured in %.0f s, kept in %s", time.perf_counter() - begun, file)
    return record


def measured_record(
    request: Request, engine: EngineArgs, target: ModelConfig, key: dict[str, Any], plan: Plan, note: Note
) -> dict[str, Any]:
    """Measure a pair by a plan, and verify what was chosen.  key: of `storage.identity`.

    Raises: TuningError, EngineError.
    """
    passed = {name: value for name, value in request.spec.items() if value is not None and is_json(value)}
    passed.pop(PER_REQUEST, None)
    speculative = passed | {"method": request.drafter.name, "model": request.where}
    mode = mode_for(target.model, bool(engine.enforce_eager))
    settings = engine_settings(engine, target, plan.max_batch)
    measurement = measure(settings, speculative, request.most, plan, mode, note)
    record = record_of(key, measurement, request.most, plan)
    return verified(record, settings, speculative, plan, mode, note) if plan.rounds else record
