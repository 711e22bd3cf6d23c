"""From measured step times and acceptance to draft lengths by batch size, in vLLM's format.

vLLM takes ``num_speculative_tokens_per_batch_size = [[first, last, K], ...]``: inclusive ranges of batch sizes from 1,
the last K going on above.  Where K is 0 the drafter still runs its first pass, to keep its KV cache up to date, so that
a zero in a schedule costs more than no speculation at all.  Both are measured, and both are choices here.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_gumiho.errors import TuningError
from vllm_gumiho.tuning.theory import expected_accepted

MARGIN = 0.05
MAX_LOSS = 0.05
# Least share that a row is taken to cost: a draft whose chance is nothing is not sent.
LEAST_ROW_COST = 1e-4


@dataclass(frozen=True)
class Costs:
    """What was measured.

    off: batch size to milliseconds of a step without speculation.  on: K (0 up to the most) to the same with the
    drafter loaded.  acceptance: conditional accuracies of positions 1..K.
    """

    off: dict[int, float]
    on: dict[int, dict[int, float]]
    acceptance: Sequence[float]

    def __post_init__(self) -> None:
        sizes = set(self.off)
        if 1 not in sizes or 0 not in self.on or any(set(row) != sizes for row in self.on.values()):
            raise TuningError("incomplete measurement: every K from 0, and off, needs times of the same sizes from 1")
        if not 0 < max(self.on) <= len(self.acceptance):
            raise TuningError(f"incomplete measurement: K up to {max(self.on)}, {len(self.acceptance)} accuracies")
        for row in (self.off, *self.on.values()):
            if any(not math.isfinite(ms) or ms <= 0 for ms in row.values()):
                raise TuningError(f"a step time is not a positive number of milliseconds: {row}")

    @property
    def sizes(self) -> list[int]:
        """Measured batch sizes, ascending."""
        return sorted(self.off)

    def speed(self, length: int | None, batch: int) -> float:
        """Expected tokens/s of K = ``length`` (None: speculation off); between measured sizes times are linear."""
        row = self.off if length is None else self.on[length]
        accepted = expected_accepted(self.acceptance[: length or 0])
        return 1000 * batch * (1 + accepted) / _between(row, batch)

    def speedup(self, length: int, batch: int) -> float:
        """Expected tokens/s of K = ``length`` over no speculation."""
        return self.speed(length, batch) / self.speed(None, batch)


@dataclass(frozen=True)
class Choice:
    """What to run.

    schedule: None for no speculation.  single: one K for every batch size, 0 for no speculation.  above: why the
    schedule loses where more requests run than were measured, None where it does not.
    """

    schedule: list[list[int]] | None
    single: int
    reason: str
    above: str | None = None


def choose(costs: Costs, margin: float = MARGIN, max_loss: float = MAX_LOSS) -> Choice:
    """The schedule with the most expected tokens/s at each batch size, or no speculation.

    At each size the fastest K is taken where it beats K = 0 by ``margin``; equals go to the smaller K.  Speculation is
    left off altogether unless some size gains ``margin`` over off, the geometric mean over measured sizes gains, and
    no size loses more than ``max_loss``.  Above the largest measured size nothing is drafted; what K = 0 costs at that
    size stands for all above.
    """
    lengths = [_best_length(costs, size, margin) for size in range(1, costs.sizes[-1] + 1)]
    gains = {size: costs.speedup(lengths[size - 1], size) for size in costs.sizes}
    single = _best_single(costs, margin, max_loss)
    reason = refusal(gains, margin, max_loss) if any(lengths) else _no_gain(costs)
    if reason is not None:
        return Choice(None, single, reason)
    reason = f"{gains_in_words(gains)} expected over no speculation"
    return Choice(ranges(lengths), single, reason, loss_above(costs, max_loss))


def loss_above(costs: Costs, max_loss: float) -> str | None:
    """Why a schedule loses where more requests run than were measured, None where it does not."""
    largest = costs.sizes[-1]
    idle = costs.speedup(0, largest)
    return f"{idle:.2f}x expected with K=0 at {largest}, under {1 - max_loss:.2f}x" if idle < 1 - max_loss else None


def ranges(lengths: Sequence[int]) -> list[list[int]]:
    """vLLM's ranges for K at batch sizes 1, 2, ...; K = 0 above."""
    found: list[list[int]] = []
    for size, length in enumerate([*lengths, 0], 1):
        if found and found[-1][2] == length:
            found[-1][1] = size
        else:
            found.append([size, size, length])
    return found


def row_cost(costs: Costs) -> float:
    """What one more row of a step takes, as a share of a step without any: the line through steps of long drafts.

    Drafts of three tokens and more cost the same whatever K is, but for their rows: heads go all at once.
    """
    cells = [
        (size * (length + 1), ms) for length, row in costs.on.items() if length >= min(3, max(costs.on))
        for size, ms in row.items()
    ]  # fmt: skip
    rows, times = zip(*cells, strict=True)
    slope, start = statistics.linear_regression(rows, times) if len(set(rows)) > 1 else (0.0, times[0])
    return max(slope, 0.0) / start + LEAST_ROW_COST if start > 0 else 1.0


def confident_schedule(costs: Costs) -> list[list[int]] | None:
    """Where drafts of a length by request may pay: the longest at every size at which one token gains over none."""
    most = max(costs.on)
    lengths = [most if costs.speed(1, n) > costs.speed(0, n) else 0 for n in range(1, costs.sizes[-1] + 1)]
    return ranges(lengths) if any(lengths) else None


def in_words(schedule: Sequence[Sequence[int]]) -> str:
    """One line for the log."""
    parts = []
    for number, (first, last, length) in enumerate(schedule):
        end = "and above" if number == len(schedule) - 1 else f"to {last}" if last > first else ""
        parts.append(f"K={length} at batch size {first} {end}".rstrip())
    return ", ".join(parts)


def refusal(gains: dict[int, float], margin: float, max_loss: float, word: str = "expected") -> str | None:
    """Why speculation is left off for such gains over it, None where it is not.

    gains: batch size to speed over no speculation, ``word`` says which kind.
    """
    size, most = max(gains.items(), key=lambda item: item[1])
    worst_size, worst = min(gains.items(), key=lambda item: item[1])
    if most < 1 + margin:
        return f"no batch size gains {margin:.0%}: the best {word} is {most:.2f}x at {size}"
    if worst < 1 - max_loss:
        return f"{most:.2f}x {word} at batch size {size}, but {worst:.2f}x at {worst_size}, under {1 - max_loss:.2f}x"
    if _mean(gains) <= 1:
        return f"{most:.2f}x {word} at batch size {size}, but {_mean(gains):.2f}x on average"
    return None


def gains_in_words(gains: dict[int, float]) -> str:
    """One line for the log."""
    return ", ".join(f"{gain:.2f}x at {size}" for size, gain in gains.items())


def _best_length(costs: Costs, batch: int, margin: float) -> int:
    most = max((length for length in costs.on if length), key=lambda k: (costs.speed(k, batch), -k), default=0)
    return most if costs.speed(most, batch) >= (1 + margin) * costs.speed(0, batch) else 0


def _best_single(costs: Costs, margin: float, max_loss: float) -> int:
    best, most = 0, 1.0
    for length in sorted(costs.on):
        gains = {size: costs.speedup(length, size) for size in costs.sizes}
        mean = _mean(gains)
        if length and mean > most and refusal(gains, margin, max_loss) is None:
            best, most = length, mean
    return best


def _no_gain(costs: Costs) -> str:
    cells = [(costs.speedup(length, size), length, size) for length in costs.on if length for size in costs.sizes]
    gain, length, size = max(cells)
    return f"drafting pays at no batch size: at best {gain:.2f}x expected, with K={length} at batch size {size}"


def _mean(gains: dict[int, float]) -> float:
    return math.exp(sum(math.log(gain) for gain in gains.values()) / len(gains))


def _between(row: dict[int, float], batch: int) -> float:
    """Milliseconds at a batch size from 1 to the largest measured, on the line between its measured neighbours."""
    if batch in row:
        return row[batch]
    sizes = sorted(row)
    upper = bisect.bisect(sizes, batch)
    a, b = sizes[upper - 1], sizes[upper]
    return row[a] + (row[b] - row[a]) * (batch - a) / (b - a)
