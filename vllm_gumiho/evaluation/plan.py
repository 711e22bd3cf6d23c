"""What a judgement needs before any engine starts: drafters, their draft lengths, vLLM's configs for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_gumiho.checkpoint.files import weight_files
from vllm_gumiho.drafters import DRAFTERS
from vllm_gumiho.drafters.checkpoints import drafter_in, open_checkpoint
from vllm_gumiho.files import sha256_of
from vllm_gumiho.request.catalogue import check_named, checkpoint_for, local_path
from vllm_gumiho.request.lengths import AUTO, draft_length
from vllm_gumiho.request.per_request import PER_REQUEST, per_request_value

DEFAULT_K = 7
# N-grams of two to five tokens are looked up; vLLM's own default, five only, finds little in short chats.
NGRAM = {"prompt_lookup_min": 2, "prompt_lookup_max": 5}


@dataclass(frozen=True)
class Drafter:
    """Where the draft weights are (None for methods without any) and the draft lengths asked for."""

    path: Path | None
    lengths: tuple[int | str, ...]


def find_drafter(method: str, checkpoint: str | None, lengths: tuple[int | str, ...], target: str) -> Drafter:
    """The checkpoint on this machine, and lengths that it can draft.  "auto" is of our drafters alone.

    Raises: CheckpointError for a target without a known checkpoint, one that is none or another drafter's, or a
    K out of range.
    """
    if method == "none":
        return Drafter(None, (0,))
    numbers = tuple(length for length in lengths if length != AUTO) or (DEFAULT_K,)
    if method == "ngram":
        return Drafter(None, numbers)
    path = local_path(checkpoint_for(checkpoint, target, method))
    if method in DRAFTERS or drafter_in(path) is not None:
        opened = open_checkpoint(path)
        check_named(str(path), opened.drafter, method)
        asked = lengths or (None,)
        return Drafter(path, tuple(AUTO if one == AUTO else draft_length(one, opened) for one in asked))
    weight_files(path)
    return Drafter(path, numbers)


def speculative_config(
    method: str, drafter: Drafter, length: int | str, per_request: str | None = None
) -> dict[str, Any] | None:
    """vLLM's speculative config for one engine of the grid; None without speculation.

    per_request: how drafts of our methods end, as `vllm_gumiho.request.per_request.per_request_option` gives it.
    """
    if method == "none":
        return None
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": length}
    if per_request is not None and method in DRAFTERS:
        config[PER_REQUEST] = per_request_value(per_request)
    return config | (NGRAM if method == "ngram" else {"model": str(drafter.path)})


def weight_digests(model: str | Path) -> dict[str, str] | None:
    """SHA-256 of each weight file by name; of a hub name's files where they are in the cache, else None."""
    path = Path(model)
    if not path.exists():
        import huggingface_hub

        try:
            path = Path(huggingface_hub.snapshot_download(str(model), local_files_only=True))
        except Exception:
            return None
    return {file.name: sha256_of(file) for file in weight_files(path)[0]}
