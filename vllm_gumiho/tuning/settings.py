"""How much a tuning run measures."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_gumiho.tuning.schedule import MARGIN, MAX_LOSS


@dataclass(frozen=True)
class Plan:
    """How much to measure.  seconds: of decoding for each cell and repeat.

    tokens: of each answer for acceptance.  rounds, answer_tokens: of the real requests that then meet the schedule, no
    rounds for none; fixed: the largest K meets them too.  limit_s: for all of it.
    """

    max_batch: int = 16
    repeats: int = 3
    seconds: float = 1.0
    tokens: int = 64
    margin: float = MARGIN
    max_loss: float = MAX_LOSS
    rounds: int = 3
    answer_tokens: int = 32
    fixed: bool = False
    limit_s: float = 4 * 3600.0

    @property
    def batches(self) -> list[int]:
        """1, 2, 4, ... and the largest."""
        sizes = [2**n for n in range(self.max_batch.bit_length()) if 2**n < self.max_batch]
        return [*sizes, self.max_batch]
