"""vLLM's sleep at level 2, on a CPU: weights' memory is given away, named buffers are saved, weights are read anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Rubbish:
    """Stands for the backend that gives memory away: what comes back holds anything."""

    def __init__(self, models: list[nn.Module]):
        self.models = models

    def suspend(self, level: int) -> None:
        for model in self.models:
            for tensor in tensors_of(model):
                tensor.fill_(float("nan") if tensor.is_floating_point() else 7)

    def resume(self, tags: Any) -> None:
        pass


def tensors_of(model: nn.Module) -> list[Tensor]:
    """What a model holds on its device: parameters, buffers, and what our modules keep beside these."""
    loose = [
        value
        for module in model.modules()
        if type(module).__module__.startswith("vllm_gumiho.")
        for value in vars(module).values()
        if isinstance(value, Tensor)
    ]
    found = [*model.parameters(), *model.buffers(), *loose]
    return [tensor.data for tensor in found if not tensor.is_meta]


def sleep_and_wake(llm: Any) -> None:
    """By the worker's own functions, in which only the device's memory is stood in for.

    vLLM reads the target's weights anew; the draft's are kept by ``sleep_preserve_parameter_names=["draft.*"]``, which
    copies from a GPU only: here they are put back by hand.
    """
    from vllm.v1.worker.gpu_worker import Worker

    worker = llm.llm_engine.model_executor.driver_worker.worker
    draft = worker.get_draft_model()
    kept = {name: parameter.detach().clone() for name, parameter in draft.named_parameters()}
    worker._sleep_mode_backend = Rubbish([worker.model_runner.model, draft])
    synchronize, info = torch.accelerator.synchronize, torch.accelerator.get_memory_info
    torch.accelerator.synchronize = lambda *args: None
    torch.accelerator.get_memory_info = lambda *args: (1 << 30, 1 << 31)
    worker.synchronize_device = lambda: None
    try:
        with torch.no_grad():
            Worker.sleep(worker, 2)
            assert all(bool(parameter.isnan().all()) for parameter in draft.parameters() if not parameter.is_meta)
            Worker.wake_up(worker)
    finally:
        torch.accelerator.synchronize, torch.accelerator.get_memory_info = synchronize, info
    worker.model_runner.reload_weights()
    with torch.no_grad():
        own = {id(parameter) for parameter in worker.model_runner.model.parameters()}
        for name, parameter in draft.named_parameters():
            if id(parameter) not in own:
                parameter.copy_(kept[name])
