"""How fast training runs: answer tokens a second, and the share of the machine's matrix-multiply rate in use."""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vllm_gumiho.training.model import TrainingModel

logger = logging.getLogger("vllm_gumiho")

PROBE_SIZE = 2048
PROBE_REPEATS = 5


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one square product (median of a few), measured on this device."""
    # Not random: drawing numbers would move the generator, and a resumed run must draw what the whole run drew.
    a = torch.linspace(-1, 1, PROBE_SIZE * PROBE_SIZE, device=device).view(PROBE_SIZE, PROBE_SIZE).to(dtype)
    times = []
    for _ in range(PROBE_REPEATS + 1):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2 * PROBE_SIZE**3 / sorted(times[1:])[PROBE_REPEATS // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class SpeedMeter:
    """Answer tokens a second, and the share of the measured matrix-multiply rate, between readings."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.peak = matmul_rate(device, dtype)
        self._device = device
        self._clear()

    def add(self, tokens: int, flops: int) -> None:
        """Count one step of ``tokens`` answer tokens and ``flops`` operations."""
        self.tokens += tokens
        self.flops += flops

    def read(self) -> dict[str, float]:
        """Rates since the last reading; measurements and checkpoints made since then count as time."""
        _wait(self._device)
        seconds = max(time.perf_counter() - self.since, 1e-9)
        rates = {"answer_tokens_per_s": self.tokens / seconds, "matmul_share": self.flops / seconds / self.peak}
        self._clear()
        return rates

    def _clear(self) -> None:
        self.tokens, self.flops, self.since = 0, 0, time.perf_counter()


def training_flops(model: TrainingModel, batch: dict[str, Tensor]) -> tuple[int, int]:
    """Operations of one training step on this batch: the target's pass, and the drafter's forward and backward pass.

    The target's is what its features cost when no store has them; an optimiser's own products are left out.  Counted
    on passes of their own, since the counter takes composite operations apart and so changes the last bits of what it
    watches; the random generator is put back.  (0, 0) where the counter of this torch does not know an operation:
    before 2.13 it takes no attention of grouped heads.
    """
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.autocast(device.type, torch.bfloat16, enabled=model.bf16),
            FlopCounterMode(display=False) as counter,
        ):
            features = model.target_features(batch)
            if not counter.get_total_flops():  # all from the store
                model.target_features(batch, cached=False)
            target = counter.get_total_flops()
            model.training_losses(batch, features)[0].backward()
    except AssertionError as error:
        logger.warning("operations of a training step are not counted: %s", error)
        return 0, 0
    finally:
        model.zero_grad()
    return target, counter.get_total_flops() - target
