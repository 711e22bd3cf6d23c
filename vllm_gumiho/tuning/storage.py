"""Schedules on disk: one JSON file for each target, checkpoint, machine and engine setting, in vLLM's cache folder."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gumiho.engines.facts import cores, processor, vllm_version
from vllm_gumiho.env import CACHE_ROOT, SCHEDULE, V2_RUNNER, cache_folder
from vllm_gumiho.errors import StorageError, TuningError
from vllm_gumiho.files import digest_of, write_json
from vllm_gumiho.request import lengths
from vllm_gumiho.request.per_request import PER_REQUEST
from vllm_gumiho.request.resolve import Request

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

FORMAT = 2
FAILED_IN = "failed_in"
logger = logging.getLogger("vllm.vllm_gumiho")


def schedules_folder() -> Path:
    """``gumiho/schedules`` under VLLM_CACHE_ROOT."""
    return cache_folder() / "schedules"


def _machine() -> dict[str, Any]:
    """What the speed of a step depends on: processor names and the number of cores this process may use."""
    from vllm.platforms import current_platform

    device = {} if current_platform.is_cpu() else {"device": current_platform.get_device_name()}
    return {"processor": processor(), "cores": cores(), **device}


def largest_batch(engine: EngineArgs) -> int:
    """Largest batch size that "auto" measures: the most requests the engine decodes at once, up to a limit."""
    from vllm.platforms import current_platform

    most = 16 if current_platform.is_cpu() else 64
    return min(engine.max_num_seqs or most, most)


def identity(request: Request, engine: EngineArgs, target: ModelConfig) -> dict[str, Any]:
    """Everything a schedule is valid for; equal identities share a file.  engine: the user's arguments."""
    other = {key: value for key, value in request.spec.items() if key not in _CHOSEN and value is not None}
    return {
        "target": _stamp(target.model),
        "checkpoint": _stamp(str(request.checkpoint.path)),
        "vllm": vllm_version(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "quantization": target.quantization,
        "kv_cache_dtype": str(engine.kv_cache_dtype),
        "eager": bool(engine.enforce_eager),
        "tensor_parallel": engine.tensor_parallel_size,
        # One measured for few requests at once says nothing of a server that decodes more.
        "largest_batch": largest_batch(engine),
        "runner": {"1": "V2", "0": "V1"}.get(V2_RUNNER.get() or "", "default"),
        "speculative": json.loads(json.dumps(other, default=str)),
        **_machine(),
    }


_CHOSEN = ("method", "model", lengths.TOKENS, lengths.SCHEDULE, PER_REQUEST, "revision")


def path_of(key: dict[str, Any]) -> Path:
    """File of an identity."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(str(key["target"]["name"])).name)[:60]
    return schedules_folder() / f"{name}-{digest_of(key)}.json"


def load(key: dict[str, Any]) -> dict[str, Any] | None:
    """The stored record of an identity, None without one.  An unusable file is named in a warning and ignored.

    One that a parent has left in the environment comes first, but for that of a measurement which failed there: a file
    that was stored since is better, and whoever failed may try again.
    """
    inherited = _inherited(key)
    failed_in = inherited and inherited.get(FAILED_IN)
    if inherited and failed_in is None:
        return inherited
    file = path_of(key)
    try:
        record = checked(json.loads(file.read_bytes()))
        if record["key"] != key:
            raise TuningError("it belongs to another model pair or machine")
        return record
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("Gumiho: stored schedule %s is not usable (%s); it is not used", file, error)
    return None if failed_in == os.getpid() else inherited


def leave_to_children(record: dict[str, Any]) -> None:
    """Put a record into the environment of this process, for those that it starts."""
    os.environ[SCHEDULE.name] = json.dumps(record)


def failed(key: dict[str, Any], most: int, reason: str) -> dict[str, Any]:
    """The record of a measurement that failed in this process: no speculation.  It is for its children alone."""
    choice = {"schedule": None, "single": 0, "reason": reason, FAILED_IN: os.getpid()}
    return {"format": FORMAT, "key": key, "most": most, **choice}


def _inherited(key: dict[str, Any]) -> dict[str, Any] | None:
    written = SCHEDULE.get()
    if not written:
        return None
    try:
        record = checked(json.loads(written))
    except (ValueError, RecursionError) as error:
        logger.warning("Gumiho: %s is not a schedule record (%s); it is not used", SCHEDULE.name, error)
        return None
    return record if record["key"] == key else None


def save(record: dict[str, Any]) -> Path:
    """Write a record in one step, so that a reader sees the old file or the new one.

    Raises: StorageError where the folder cannot be written.
    """
    file = path_of(checked(record)["key"])
    writable_folder()
    try:
        write_json(file, record, indent=1, sync=True)
    except OSError as error:
        raise StorageError(f"{file}: cannot be written ({error.strerror or error}); {_REMEDY}") from error
    return file


def writable_folder() -> Path:
    """The schedules folder, made and tried.  Raises: StorageError naming it where nothing can be written there."""
    folder: Path | str = "the folder of schedules"
    try:
        folder = schedules_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror or error}); {_REMEDY}") from error
    return folder


_REMEDY = f"set {CACHE_ROOT.name} to a folder that can"


def checked(record: Any) -> dict[str, Any]:
    """A record of the right form.  Raises: TuningError saying what is wrong with it."""
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise TuningError(f"not a schedule record of format {FORMAT}")
    key, most, single, schedule = (record.get(name) for name in ("key", "most", "single", "schedule"))
    if not isinstance(key, dict) or not isinstance(key.get("target"), dict) or "name" not in key["target"]:
        raise TuningError("no key that names a target")
    if type(most) is not int or most < 1 or type(single) is not int or not 0 <= single <= most:
        raise TuningError("no K, or one out of range")
    problem = None if schedule is None else lengths.schedule_problem(schedule, most)
    if problem is not None:
        raise TuningError(f"schedule {schedule!r}: {problem}")
    for name in ("row_cost", "per_request"):
        value = record.get(name)
        if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise TuningError(f"{name} {value!r}: not the share of a step that a row costs")
    if not isinstance(record.get("reason"), str) or not isinstance(record.get("above"), (str, type(None))):
        raise TuningError("no reason, or one that is not text")
    return record


def _stamp(name: str) -> dict[str, str]:
    """A model's name and, for one on disk, a digest of its files' names, sizes and times: contents may change."""
    path = Path(name)
    if not path.exists():
        return {"name": name}
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    kept = [file for file in files if file.suffix in (".json", ".safetensors", ".bin", ".gguf") and file.is_file()]
    facts = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in kept]
    return {"name": str(path.resolve()), "files": digest_of(facts)}
