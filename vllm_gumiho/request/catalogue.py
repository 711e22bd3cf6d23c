"""Which checkpoint belongs to which target, and where checkpoints are found.

A user's own pairs come before the built-in ones: a JSON object ``{"target": "checkpoint"}`` in the file that
``VLLM_GUMIHO_CHECKPOINTS`` names (or in the variable itself), or in ``vllm-gumiho/checkpoints.json`` of the user's
config folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from vllm_gumiho.drafters import DEFAULT, DRAFTERS, Drafter
from vllm_gumiho.env import CHECKPOINTS, config_file
from vllm_gumiho.errors import CheckpointError

BUNDLED = Path(__file__).parents[1] / "heads"

HEADS = {"HuggingFaceTB/SmolLM2-135M-Instruct": BUNDLED / "smollm2-135m-instruct"}


def known_pairs(drafter: Drafter = DEFAULT) -> dict[str, str]:
    """Target to checkpoint, user's pairs first, of whatever drafter; then those that we know of this ``drafter``.

    Raises: CheckpointError for a user table that is not one.
    """
    pairs = _user_pairs()
    theirs = {target.lower() for target in pairs}
    bundled = HEADS if drafter is DEFAULT else {}
    built_in = {target: str(checkpoint) for target, checkpoint in (*bundled.items(), *drafter.released.items())}
    return pairs | {target: checkpoint for target, checkpoint in built_in.items() if target.lower() not in theirs}


def find_checkpoint(target: str, drafter: Drafter = DEFAULT) -> str:
    """Checkpoint for a target named by hub name, hub-cache folder, or a folder named like the model.

    Raises: CheckpointError listing the known targets.
    """
    pairs = known_pairs(drafter)
    names = _names(target)
    for known, checkpoint in pairs.items():
        if known.lower() in names or (Path(target).is_dir() and known.split("/")[-1].lower() in names):
            return checkpoint
    listing = "\n".join(f"  {known} -> {checkpoint}" for known, checkpoint in pairs.items()) or "  none"
    raise CheckpointError(
        f"no {drafter.title} checkpoint is known for target {target!r}.  Known:\n{listing}\n"
        f'Name one with "model": CHECKPOINT in the speculative config, or add the pair to a JSON object in '
        f"{CHECKPOINTS.name} (a file or the text itself)."
    )


def checkpoint_for(asked: str | None, target: str, method: str | None = None) -> str:
    """The checkpoint asked for; the target's known one where none or only a drafter is named, by either word.

    Raises: CheckpointError as `find_checkpoint`.
    """
    if asked is not None and asked not in DRAFTERS:
        return asked
    return find_checkpoint(target, DRAFTERS.get(asked or method or DEFAULT.name, DEFAULT))


def check_named(where: str, found: Drafter, *words: str | None) -> None:
    """Refuse a checkpoint of another drafter than the first of ``words`` that names one.  Raises: CheckpointError."""
    named = next((DRAFTERS[word] for word in words if word in DRAFTERS), found)
    if named is not found and named.name not in found.also_named:
        raise CheckpointError(
            f"{where}: is a {found.title} checkpoint, and the request names {named.name!r}; name a {named.title} "
            f"checkpoint, or ask for {found.name!r}"
        )


def local_path(checkpoint: str, revision: str | None = None) -> Path:
    """Local path of a checkpoint; a hub name is fetched (tensors and config only), or taken from the cache offline.

    Raises: CheckpointError when it is neither on this machine nor on the hub.
    """
    path = Path(checkpoint).expanduser()
    if path.exists():
        return path
    if checkpoint.count("/") != 1 or checkpoint.startswith(("/", ".", "~")):
        raise CheckpointError(f"{checkpoint}: no such file or folder, and not a hub name (owner/name); give one")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                checkpoint, revision=revision, allow_patterns=["config.json", "*.safetensors", "*.bin", "*.index.json"]
            )
        )
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{checkpoint}: not a local folder, and the hub did not give it "
            f"({type(error).__name__}: {reason}); check the name, the network and HF_HUB_OFFLINE, or give a folder"
        ) from error


def _names(target: str) -> set[str]:
    """Lower-case names a target path may be known by."""
    names = {target.lower()}
    for part in Path(target).parts:
        if part.startswith("models--"):
            names.add(part.removeprefix("models--").replace("--", "/").lower())
    names.add(Path(target).name.lower())
    return names


def _user_pairs() -> dict[str, str]:
    text, source, file = CHECKPOINTS.get() or None, CHECKPOINTS.name, config_file()
    if text is not None and not text.lstrip().startswith("{"):
        file, text = Path(text).expanduser(), None
        if not file.is_file():
            raise CheckpointError(
                f"{CHECKPOINTS.name} names {file}, which is no file; give a JSON file or a JSON object"
            )
    if text is None:
        if not file.is_file():
            return {}
        source = str(file)
    try:
        pairs = json.loads(text or file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f'{source}: not JSON ({error}); expected {{"target": "checkpoint"}}') from error
    if not isinstance(pairs, dict) or not all(isinstance(v, str) and v for v in pairs.values()):
        raise CheckpointError(f'{source}: expected a JSON object {{"target": "checkpoint"}} of strings')
    return pairs
