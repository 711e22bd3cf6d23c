"""Checkpoints in the layouts they come in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import VOCAB

LAYER = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": VOCAB}


def sharded(folder: Path, tensors: dict, suffix: str, index: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stem, index_name = {
        "bin": ("pytorch_model", "pytorch_model.bin.index.json"),
        "safetensors": ("model", "model.safetensors.index.json"),
    }[suffix]
    names, places = sorted(tensors), {}
    for i in range(3):
        file = f"{stem}-0000{i + 1}-of-00003.{suffix}"
        shard = {name: tensors[name] for name in names[i::3]}
        torch.save(shard, folder / file) if suffix == "bin" else save_file(shard, folder / file)
        places |= dict.fromkeys(shard, file)
    if index:
        (folder / index_name).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def hub_cache(folder: Path, tensors: dict) -> Path:
    """As huggingface_hub lays it out: the snapshot's files are links to blobs outside it."""
    (folder / "blobs").mkdir(parents=True)
    snapshot = folder / "snapshots" / "0123abcd"
    blobs = sharded(folder / "blobs", tensors, "safetensors")
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return snapshot


def old_pickle(folder: Path, tensors: dict) -> Path:
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder
