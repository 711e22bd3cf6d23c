"""``train_main.py`` with the drafter's weights shared out over CPU processes by FSDP2.

Accelerate shards on accelerators alone: the process group's label says so here, and gloo does the rest.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from accelerate.state import DistributedType, PartialState

_init = PartialState.__init__


def _as_on_gpus(self, *args, **kwargs) -> None:
    _init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = _as_on_gpus
    runpy.run_path(str(Path(__file__).with_name("train_main.py")), run_name="__main__")
