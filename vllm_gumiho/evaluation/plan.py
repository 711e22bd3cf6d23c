"""What a judgement is asked for, checked before any engine starts."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vllm_gumiho.catalogue import find_checkpoint, resolve
from vllm_gumiho.checkpoint import looks_like_gumiho, open_checkpoint
from vllm_gumiho.checkpoint.files import weight_files
from vllm_gumiho.evaluation import EvalError

METHODS = ("gumiho", "eagle", "ngram", "none")
DEFAULT_K = 7
# N-grams of two to five tokens are looked up; vLLM's own default, five only, finds little in short chats.
NGRAM = {"prompt_lookup_min": 2, "prompt_lookup_max": 5}


@dataclass(frozen=True)
class Settings:
    """What the user asks for; lists make a grid, one engine for each K."""

    target: str
    prompts: Path
    json: Path
    method: str = "gumiho"
    checkpoint: str | None = None
    num_speculative_tokens: tuple[int, ...] = ()
    temperatures: tuple[float, ...] = (0.0,)
    baseline: Path | None = None
    limit: int = 0
    max_tokens: int = 64
    max_num_seqs: int = 8
    max_model_len: int | None = None
    dtype: str | None = None
    eager: bool | None = None
    seed: int = 0
    all_turns: bool = False

    def recorded(self) -> dict[str, Any]:
        """For the report: paths as text."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Drafter:
    """Where the draft weights are (None for methods without any) and the draft lengths asked for."""

    path: Path | None
    lengths: tuple[int, ...]


def check_settings(settings: Settings) -> None:
    """Raises: EvalError for a method, a number or a combination that cannot be judged."""
    if settings.method not in METHODS:
        raise EvalError(f"--method {settings.method!r}: no such method; give one of {', '.join(METHODS)}")
    for name, least in (("limit", 0), ("max_tokens", 1), ("max_num_seqs", 1), ("max_model_len", 1), ("seed", 0)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise EvalError(f"--{name.replace('_', '-')} {value}: give a whole number from {least}")
    for temperature in settings.temperatures:
        if not math.isfinite(temperature) or temperature < 0:
            raise EvalError(f"--temperature {temperature}: give 0 (greedy) or a positive number")
    for name in ("temperatures", "num_speculative_tokens"):
        values = getattr(settings, name)
        if len(set(values)) < len(values):
            raise EvalError(f"--{name.rstrip('s').replace('_', '-')}: a value is given twice: {list(values)}")
    if any(length < 1 for length in settings.num_speculative_tokens):
        raise EvalError(f"--num-speculative-tokens {min(settings.num_speculative_tokens)}: give whole numbers from 1")
    if settings.method == "none" and settings.baseline is not None:
        raise EvalError(f"--baseline {settings.baseline}: --method none makes baselines; leave it out")
    if settings.method == "none" and settings.num_speculative_tokens:
        raise EvalError("--num-speculative-tokens goes with a method that drafts, not with 'none'; leave it out")
    if settings.method in ("ngram", "none") and settings.checkpoint is not None:
        raise EvalError(f"--checkpoint {settings.checkpoint}: method {settings.method!r} has none; leave it out")
    if settings.method == "eagle" and settings.checkpoint in (None, "gumiho"):
        raise EvalError("--method eagle needs --checkpoint FOLDER, an EAGLE drafter of this target")


def find_target(target: str) -> str:
    """Folder or hub name of the target; 'smollm2' is the embedded one, built if need be.

    Raises: EvalError for a folder that is no model.
    """
    if target == "smollm2":
        from vllm_gumiho.embedded import embedded_target

        return str(embedded_target().resolve())
    path = Path(target).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise EvalError(f"--target {target}: no config.json in that folder; give a Hugging Face model folder")
        return str(path.resolve())
    if target.count("/") != 1 or target.startswith(("/", ".", "~")):
        raise EvalError(f"--target {target}: no such folder, and not a hub name (owner/name); or give 'smollm2'")
    return target


def find_drafter(settings: Settings, target: str) -> Drafter:
    """The checkpoint on this machine, and lengths that it can draft.

    Raises: CheckpointError for a target without a known checkpoint, a checkpoint that is none, or a K out of range.
    """
    lengths = settings.num_speculative_tokens
    if settings.method == "none":
        return Drafter(None, (0,))
    if settings.method == "ngram":
        return Drafter(None, lengths or (DEFAULT_K,))
    asked = settings.checkpoint or "gumiho"
    path = resolve(find_checkpoint(target) if asked == "gumiho" else asked)
    if settings.method == "gumiho" or looks_like_gumiho(path):
        from vllm_gumiho.config import _draft_length

        checkpoint = open_checkpoint(path)
        lengths = tuple(_draft_length(length, checkpoint) for length in lengths or (None,))
    else:
        weight_files(path)
        lengths = lengths or (DEFAULT_K,)
    return Drafter(path, lengths)


def speculative_config(settings: Settings, drafter: Drafter, length: int) -> dict[str, Any] | None:
    """vLLM's speculative config for one engine of the grid; None without speculation."""
    if settings.method == "none":
        return None
    config: dict[str, Any] = {"method": settings.method, "num_speculative_tokens": length}
    return config | (NGRAM if settings.method == "ngram" else {"model": str(drafter.path)})


def check_writable(file: Path) -> None:
    """Make the report's folder and try it.  Raises: EvalError, before hours of work are lost."""
    try:
        if file.is_dir():
            raise IsADirectoryError("it is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}."):
            pass
    except OSError as error:
        raise EvalError(f"{file}: cannot be written ({error}); give another path") from error


def weight_digests(model: str | Path) -> dict[str, str] | None:
    """SHA-256 of each weight file by name; of a hub name's files where they are in the cache, else None."""
    path = Path(model)
    if not path.exists():
        import huggingface_hub

        try:
            path = Path(huggingface_hub.snapshot_download(str(model), local_files_only=True))
        except Exception:
            return None
    digests = {}
    for file in weight_files(path)[0]:
        with file.open("rb") as content:
            digests[file.name] = _sha256(content)
    return digests


def _sha256(content: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := content.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def on_cpu() -> bool:
    """Whether engines will run on the CPU: PyTorch sees no accelerator."""
    import torch

    return not torch.accelerator.is_available()


def default_dtype() -> str:
    """float32 on a CPU, where greedy texts are then comparable token for token; else the target's own."""
    return "float32" if on_cpu() else "auto"


def machine() -> dict[str, Any]:
    """CPU name, cores this process may use, memory in GiB."""
    from cpuinfo import get_cpu_info

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": get_cpu_info().get("brand_raw", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
    }
