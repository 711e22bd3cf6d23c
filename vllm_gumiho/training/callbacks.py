"""What a training run does beside its steps: checkpoints by the clock, and each of them ready to serve."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from vllm_gumiho.training.model import TrainingModel
from vllm_gumiho.training.provenance import write_recipe
from vllm_gumiho.training.recipe import Recipe


class TimedCheckpoints(TrainerCallback):
    """Makes a checkpoint when the last one is some minutes old: steps take longer on a machine that others use.

    The first process's clock decides for all: they have to come to a checkpoint together.
    """

    def __init__(self, minutes: float):
        self.seconds, self.last = 60 * minutes, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = time.monotonic() - self.last > self.seconds
        if args.world_size > 1:
            said = torch.tensor(int(due), device=args.device)
            torch.distributed.broadcast(said, 0)
            due = bool(said.item())
        if due:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.monotonic()


class ExportCallback(TrainerCallback):
    """Writes the drafter, ready to serve, beside each Trainer checkpoint, and tells the model how far the run is."""

    def __init__(self, recipe: Recipe, model: TrainingModel, made: dict[str, Any]):
        """made: what `made_with` returned."""
        self.recipe, self.model, self.made = recipe, model, made

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.progress = state.global_step / max(1, state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tensors = drafter_tensors(self.model)
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "drafter"
            export(tensors, self.model, self.recipe, self.made, folder)


def drafter_tensors(model: TrainingModel) -> dict[str, Tensor]:
    """The drafter's whole tensors on the CPU; every process has to ask, since FSDP gathers them from all."""
    tensors = {}
    for name, value in model.drafter.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        tensors[name] = whole.detach().cpu().contiguous()
    return tensors


def export(
    tensors: dict[str, Tensor], model: TrainingModel, recipe: Recipe, made: dict[str, Any], folder: Path
) -> None:
    """Write the drafter's tensors in the format the engine serves it from, with recipe.json beside it.

    made: what `made_with` returned.
    """
    model.drafter.save(folder, tensors, recipe.target, model.objective.vocabulary)
    write_recipe(folder / "recipe.json", recipe, made)
