"""One training run in a process of its own: ``python train_main.py RECIPE.json [resume]``."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from vllm_gumiho.training.recipe import Recipe
from vllm_gumiho.training.trainer import train

_end = torch.distributed.destroy_process_group


def _end_unheld(*group) -> None:
    held = [made for made in gc.get_objects() if type(made) is DistributedDataParallel]
    assert not held, "DistributedDataParallel is left: it would end the group with Python's lock held"
    _end(*group)


if __name__ == "__main__":
    torch.distributed.destroy_process_group = _end_unheld
    train(Recipe(**json.loads(Path(sys.argv[1]).read_text())), resume=sys.argv[2:] == ["resume"])
    assert not torch.distributed.is_initialized(), "a process group is left, whose threads may abort the process"
