"""One training run in a process of its own: ``python train_main.py RECIPE.json [resume]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm_gumiho.training.recipe import Recipe
from vllm_gumiho.training.trainer import train

if __name__ == "__main__":
    train(Recipe(**json.loads(Path(sys.argv[1]).read_text())), resume=sys.argv[2:] == ["resume"])
