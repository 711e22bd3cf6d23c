"""One training run in a process of its own: ``python train_main.py RECIPE.json [resume]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed

from vllm_gumiho.training.recipe import Recipe
from vllm_gumiho.training.trainer import train

if __name__ == "__main__":
    train(Recipe(**json.loads(Path(sys.argv[1]).read_text())), resume=sys.argv[2:] == ["resume"])
    assert not torch.distributed.is_initialized(), "a process group is left, whose threads may abort the process"
