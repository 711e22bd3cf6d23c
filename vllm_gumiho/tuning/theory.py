"""Expected accepted length and speed of a draft of K tokens.

Draft token j is right, given that all before it were, with probability p_j (its conditional accuracy).  Verification
keeps the longest right beginning, so that a draft of K tokens gives on average

    E(K) = sum over i = 1..K of p_1 p_2 ... p_i      accepted tokens, and 1 + E(K) tokens a step (acceptance length).

Theorem 3.1 of the paper (arXiv 2503.10135) says that earlier accuracy counts more: of two drafters with the same sum
of accuracies the one that has more of it early is accepted further.  Moving accuracy from position j to an earlier
one never lowers E where no position after j is more accurate than j.  Without that condition it can: (.5, .5, 1, 1, 1)
has E = 1.25, (1, 0, 1, 1, 1) has E = 1.

A step of a draft with s serial tokens and n from heads, K = s + n, over B requests is modelled as

    T = target + verify (B (K + 1) - 1) + serial s + (heads if n > 0)        milliseconds

and speed as B (1 + E) / T.  Serial steps and heads are taken to cost the same for any B, and n heads the same as one,
as they are bound by reading weights; where that is untrue, measure (`vllm-gumiho tune`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_gumiho.errors import TuningError


def expected_accepted(accuracies: Iterable[float]) -> float:
    """E: mean number of accepted draft tokens, from conditional accuracies p_1..p_K in [0, 1]."""
    total, reached = 0.0, 1.0
    for accuracy in accuracies:
        reached *= accuracy
        total += reached
    return total


def acceptance_length(accuracies: Iterable[float]) -> float:
    """1 + E: mean tokens a step, as vLLM's metrics count them."""
    return 1.0 + expected_accepted(accuracies)


def sensitivity(accuracies: Sequence[float]) -> list[float]:
    """dE/dp_i: accepted tokens that accuracy at each position is worth; what p_i opens the way to, not p_i itself."""
    return [math.prod(accuracies[:i]) * (1 + expected_accepted(accuracies[i + 1 :])) for i in range(len(accuracies))]


def conditional(marginal: Sequence[float]) -> list[float]:
    """Conditional accuracies from the shares of drafts accepted up to each position (vLLM's per-position rates)."""
    before, result = 1.0, []
    for share in marginal:
        result.append(min(1.0, share / before) if before > 0 else 0.0)
        before = share
    return result


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of the parts of a step.

    target: target pass over one token.  verify: each further token in that pass.  serial: one serial draft step with
    its LM head.  heads: all heads with theirs.
    """

    target: float
    verify: float
    serial: float
    heads: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
                raise TuningError(f"step time {name}={value!r}: give milliseconds, a number of at least 0")
        if self.target == 0:
            raise TuningError("step time target=0: a pass of the target takes time; give its milliseconds")

    def step(self, serial: int, heads: int, batch: int = 1) -> float:
        """Milliseconds of a step that drafts ``serial + heads`` tokens for each of ``batch`` requests."""
        extra = batch * (serial + heads + 1) - 1
        return self.target + self.verify * extra + self.serial * serial + (self.heads if heads else 0.0)

    def at(self, serial: float, heads: float) -> StepTimes:
        """The same with these shares of the bytes that drafting reads: its time is that of reading them."""
        return StepTimes(self.target, self.verify, self.serial * serial, self.heads * heads)


@dataclass(frozen=True)
class Option:
    """One way to draft: ``serial`` tokens one after the other, then ``heads`` at once.

    accepted: E.  sensitivity: dE/dp_i for each of the K positions.
    """

    serial: int
    heads: int
    accepted: float
    sensitivity: tuple[float, ...]
    step_ms: float
    tokens_per_s: float
    speedup: float

    @property
    def length(self) -> int:
        """K, draft tokens a step."""
        return self.serial + self.heads


def options(
    serial_accuracies: Sequence[float],
    head_accuracies: Sequence[float],
    times: StepTimes,
    batch: int = 1,
    serial_steps: int | None = None,
) -> list[Option]:
    """Every split of every K, no drafting (K = 0) first.

    serial_accuracies, head_accuracies: conditional accuracy at position 1, 2, ... of a token drafted by a serial step
    and of one drafted by a head.  A split with s serial steps takes the first s of the one and the rest of the other.
    serial_steps: only splits that a drafter with so many trained serial steps can make.

    Raises: TuningError for accuracies outside [0, 1], none at all, or a batch below 1.
    """
    for name, values in (("serial", serial_accuracies), ("head", head_accuracies)):
        for position, value in enumerate(values, 1):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
                raise TuningError(f"{name} accuracy {value!r} at position {position}: give a number from 0 to 1")
    if not serial_accuracies and not head_accuracies:
        raise TuningError("no accuracies: give at least one")
    if batch < 1:
        raise TuningError(f"batch {batch}: give a number of requests of at least 1")
    off = 1000 * batch / times.step(0, 0, batch)
    found = [Option(0, 0, 0.0, (), times.step(0, 0, batch), off, 1.0)]
    for length in range(1, max(len(serial_accuracies), len(head_accuracies)) + 1):
        for serial in range(min(length, len(serial_accuracies)) + 1):
            heads = length - serial
            if heads and length > len(head_accuracies):
                continue
            if serial_steps is not None and serial != min(length, serial_steps):
                continue
            accuracies = [*serial_accuracies[:serial], *head_accuracies[serial:length]]
            accepted = expected_accepted(accuracies)
            step = times.step(serial, heads, batch)
            speed = 1000 * batch * (1 + accepted) / step
            found.append(Option(serial, heads, accepted, tuple(sensitivity(accuracies)), step, speed, speed / off))
    return found


def best(found: Sequence[Option]) -> Option:
    """The fastest; of equals the one that drafts least."""
    return max(found, key=lambda option: (option.tokens_per_s, -option.length, -option.serial))
