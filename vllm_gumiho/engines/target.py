"""The target that a command is given."""

from __future__ import annotations

from pathlib import Path

from vllm_gumiho.engines.smollm2 import smollm2_folder
from vllm_gumiho.errors import TargetError

SMOLLM2 = "smollm2"


def find_target(target: str) -> str:
    """Whole path of a folder, or hub name; 'smollm2' is the embedded target, built under ``models`` if need be.

    Raises: TargetError for a folder that is no model, or a target that cannot be built.
    """
    if target == SMOLLM2:
        return str(smollm2_folder().resolve())
    path = Path(target).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise TargetError(f"--target {target}: no config.json in that folder; give a Hugging Face model folder")
        return str(path.resolve())
    if target.count("/") != 1 or target.startswith(("/", ".", "~")):
        raise TargetError(f"--target {target}: no such folder, and not a hub name (owner/name); or give 'smollm2'")
    return target
