"""``"num_speculative_tokens": "auto"``: the stored schedule of a pair on this machine, measured if there is none."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from vllm_gumiho.checkpoint import CheckpointError, open_checkpoint
from vllm_gumiho.config import check_features, derive_draft_config, locate
from vllm_gumiho.tuning import StorageError, TuningError, storage
from vllm_gumiho.tuning.measure import Note, Plan, engine_settings, is_json, measure, mode_for, record_of
from vllm_gumiho.tuning.schedule import in_words
from vllm_gumiho.tuning.verify import verified

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

logger = logging.getLogger("vllm.vllm_gumiho")
_SCHEDULE = "num_speculative_tokens_per_batch_size"


def settle(
    spec: dict[str, Any], engine: EngineArgs, target: ModelConfig, parallel: ParallelConfig
) -> dict[str, Any] | None:
    """The user's speculative config with "auto" replaced by lengths, or None to start without speculation.

    Says in one line of the log what was chosen and why.  Where nothing is stored, measures in processes of their own
    (this one must not hold the accelerator yet) and stores the result; when that fails there is a warning and no
    speculation.

    Raises: CheckpointError for a config that also gives a schedule, or a checkpoint that cannot be used.
    """
    if spec.get(_SCHEDULE) is not None:
        raise CheckpointError(
            f'num_speculative_tokens "auto" and {_SCHEDULE} say the same twice; leave one of them out, or give a '
            "number with the schedule"
        )
    check_features(spec, parallel)
    checkpoint = open_checkpoint(locate(spec, target)[1])
    derive_draft_config(checkpoint, target)
    if engine.load_format != "dummy":
        # Here, where it is refused: a damaged one that only the measuring engine meets would mean no speculation.
        checkpoint.verify(target.get_vocab_size())
    try:
        record = stored_or_measured(spec, engine, target)
    except (TuningError, OSError) as error:
        logger.warning("Gumiho: no schedule could be measured (%s); the engine starts without speculation", error)
        return None
    return apply(record, spec, parallel.data_parallel_size, engine.max_num_seqs)


def apply(
    record: dict[str, Any], spec: dict[str, Any], data_parallel: int, max_num_seqs: int | None
) -> dict[str, Any] | None:
    """A record's choice put into the user's config; None for no speculation.

    max_num_seqs: None where the user leaves it to vLLM, whose defaults are above what is measured.

    vLLM drops schedules under data parallelism, where ranks could choose different lengths and wait for each other for
    ever: the one best K for all batch sizes is used there.
    """
    schedule = record["schedule"]
    if data_parallel > 1:
        if not record["single"]:
            logger.info(
                "Gumiho: the engine starts without speculation: data parallelism needs a single K, and none pays at "
                "every batch size by measurement on this machine (%s)", record["reason"],
            )  # fmt: skip
            return None
        logger.info("Gumiho: K=%d at every batch size, as vLLM takes no schedule here", record["single"])
        return {**spec, "num_speculative_tokens": record["single"]}
    if schedule is None:
        logger.info(
            "Gumiho: the engine starts without speculation, by measurement on this machine (%s)", record["reason"]
        )
        return None
    largest = schedule[-1][0] - 1
    if record.get("above") and (max_num_seqs is None or max_num_seqs > largest):
        logger.info(
            "Gumiho: the engine starts without speculation, as more than %d requests at once would be slower with it "
            "(%s); --max-num-seqs %d lets it draft, and vllm-gumiho tune with a larger --max-batch may",
            largest, record["above"], largest,
        )  # fmt: skip
        return None
    logger.info("Gumiho: schedule by measurement on this machine: %s (%s)", in_words(schedule), record["reason"])
    most = max(length for *_, length in schedule)
    return {**spec, "num_speculative_tokens": most, _SCHEDULE: schedule}


def stored_or_measured(spec: dict[str, Any], engine: EngineArgs, target: ModelConfig) -> dict[str, Any]:
    """The record of this pair and machine.  Of several processes that need it at once, one measures.

    Raises: TuningError when it cannot be measured; CheckpointError for a checkpoint that cannot be used.
    """
    where, path = locate(spec, target)
    key = storage.identity(engine, target, path, spec)
    record = storage.load(key)
    if record is not None:
        return record
    try:
        folder = storage.writable_folder()
    except StorageError as error:
        logger.warning("Gumiho: the schedule will not be stored: %s", error)
        return _measure_and_keep(spec, where, path, engine, target, key)
    with filelock.FileLock(folder / f".{storage.path_of(key).name}.lock"):
        return storage.load(key) or _measure_and_keep(spec, where, path, engine, target, key)


def _measure_and_keep(
    spec: dict[str, Any], where: str, path: Path, engine: EngineArgs, target: ModelConfig, key: dict[str, Any]
) -> dict[str, Any]:
    plan = Plan(
        max_batch=storage.largest_batch(engine), repeats=2, seconds=0.3, tokens=32, answer_tokens=16, limit_s=1800
    )
    logger.info(
        "Gumiho: no schedule is stored for this pair on this machine; measuring batch sizes up to %d in processes of "
        "their own before the engine starts, once, for some minutes (vllm-gumiho tune does it beforehand)",
        plan.max_batch,
    )
    begun = time.perf_counter()
    record = measured_record(spec, where, path, engine, target, key, plan, logger.debug)
    try:
        file = str(storage.save(record))
    except StorageError:
        file = "the environment of this process and its children"
        os.environ[storage.VARIABLE] = json.dumps(record)
    logger.info("Gumiho: measured in %.0f s, kept in %s", time.perf_counter() - begun, file)
    return record


def measured_record(
    spec: dict[str, Any], where: str, path: Path, engine: EngineArgs, target: ModelConfig, key: dict[str, Any],
    plan: Plan, note: Note,
) -> dict[str, Any]:  # fmt: skip
    """Measure a pair by a plan, and verify what was chosen.  Raises: TuningError, CheckpointError."""
    most = open_checkpoint(path).sizes.max_draft_tokens
    passed = {name: value for name, value in spec.items() if value is not None and is_json(value)}
    speculative = passed | {"method": "gumiho", "model": where}
    mode = mode_for(target.model, bool(engine.enforce_eager))
    settings = engine_settings(engine, target, plan.max_batch)
    measurement = measure(settings, speculative, most, plan, mode, note)
    record = record_of(key, measurement, most, plan)
    return verified(record, settings, speculative, plan, mode, note) if plan.rounds else record
