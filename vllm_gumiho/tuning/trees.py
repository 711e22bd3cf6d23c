"""Expected accepted length and speed of draft trees, from how often each of a drafter's choices is right.

A *caterpillar* has the drafter's chain as its spine, and beside each token of the spine other choices for the same
position as leaves.  It needs no further draft pass: the choices are the top-k of logits that the chain is drafted from.
Where choice r of position d is the target's token with probability a_d(r), given that the spine was right up to d,

    E = sum over nodes (d, r) of a_1(1) ... a_{d-1}(1) a_d(r)       accepted tokens.

A node's value is at most its parent's, so that the N nodes of largest value are a tree, and the best of its kind.

A step of a tree of N nodes, drafted d tokens deep for B requests, is modelled as

    T = target over B (N + 1) rows + min(d, S) serial steps + (heads if d > S) + extra        milliseconds

with S serial steps; ``extra`` is what a tree costs beside its rows: the top-k, the mask in attention, moving the KV
cache of what was accepted.  A chain of K tokens is the tree of its spine alone, without ``extra``.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_gumiho.errors import TuningError

NODES = (4, 6, 8, 12, 16, 24, 32, 48, 64)
BATCHES = (1, 2, 4, 8, 16)
# A tree that gains less over the best chain is not worth its code.
MARGIN = 0.05
Rates = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Times:
    """Milliseconds of the parts of a step.

    target: ``(rows, ms)`` of passes of the target, ascending; between them times are linear, and behind the last at the
    slope before it.  serial: one serial draft step.  heads: all heads.  extra: of a tree beside its rows.
    """

    target: tuple[tuple[float, float], ...]
    serial: float
    heads: float
    extra: float = 0.0

    def __post_init__(self) -> None:
        numbers = [value for point in self.target for value in point] + [self.serial, self.heads, self.extra]
        wrong = [value for value in numbers if not _number(value) or value < 0]
        rows = [point[0] for point in self.target]
        if wrong or len(rows) < 2 or rows != sorted(set(rows)) or self.target[0][1] <= 0:
            raise TuningError(
                f"times of passes {list(self.target)!r}, serial {self.serial!r}, heads {self.heads!r}: give two or "
                "more pairs [rows, ms] of ascending rows, and milliseconds of at least 0"
            )

    def pass_ms(self, rows: int) -> float:
        """Of the target over ``rows`` rows."""
        at = min(max(bisect_left([point[0] for point in self.target], rows), 1), len(self.target) - 1)
        (r0, t0), (r1, t1) = self.target[at - 1], self.target[at]
        if rows <= r0:
            return t0
        return t0 + (t1 - t0) * (rows - r0) / (r1 - r0)


@dataclass(frozen=True)
class Tree:
    """A caterpillar.  depth: of the spine.  leaves: ``(position, rank)`` of the other choices, ranks from 2.

    accepted: E.  chain: whether it is a spine alone.
    """

    depth: int
    leaves: tuple[tuple[int, int], ...]
    accepted: float

    @property
    def nodes(self) -> int:
        """N, draft tokens a step."""
        return self.depth + len(self.leaves)

    @property
    def chain(self) -> bool:
        """Whether nothing but the spine is drafted."""
        return not self.leaves


def checked(rates: Rates) -> list[list[float]]:
    """Rates ``[K][ranks]``, each a probability.  Raises: TuningError where they are none."""
    for position, ranks in enumerate(rates, 1):
        if not ranks or any(not _number(value) or not 0 <= value <= 1 for value in ranks) or sum(ranks) > 1 + 1e-9:
            raise TuningError(
                f"rank hits at position {position} are {list(ranks)!r}: give shares that add up to 1 at most"
            )
    if not rates:
        raise TuningError("no rank hits: give those of one position at least")
    return [list(ranks) for ranks in rates]


def best_tree(rates: Rates, depth: int, nodes: int) -> Tree | None:
    """The caterpillar of ``nodes`` nodes whose spine has ``depth`` tokens; None where there are too few choices."""
    before = [math.prod(ranks[0] for ranks in rates[:d]) for d in range(depth + 1)]
    others = [(before[d] * rates[d][r], -d, -r) for d in range(depth) for r in range(1, len(rates[d]))]
    if not depth <= nodes <= depth + len(others):
        return None
    taken = sorted(others, reverse=True)[: nodes - depth]
    leaves = tuple(sorted((1 - d, 1 - r) for _, d, r in taken))
    return Tree(depth, leaves, sum(before[1:]) + sum(value for value, _, _ in taken))


@dataclass(frozen=True)
class Choice:
    """A tree at a batch size.  over_off: speed over no speculation."""

    batch: int
    tree: Tree
    step_ms: float
    tokens_per_s: float
    over_off: float


def choices(
    rates: Rates, times: Times, batches: Sequence[int] = BATCHES, nodes: Sequence[int] = NODES, serial_steps: int = 2
) -> list[Choice]:
    """At each batch size no speculation, every chain, and the fastest caterpillar of every size, with a leaf at least.

    rates: ``[K][ranks]``.  Raises: TuningError for rates that are none, or a size below 1.
    """
    rates = checked(rates)
    if min((*batches, *nodes, serial_steps + 1)) < 1:
        raise TuningError(f"batch sizes {list(batches)}, nodes {list(nodes)}: give whole numbers of at least 1")
    found: list[Choice] = []
    for batch in batches:
        off = 1000 * batch / times.pass_ms(batch)

        def timed(tree: Tree, batch: int = batch, off: float = off) -> Choice:
            step = times.pass_ms(batch * (tree.nodes + 1)) + times.serial * min(tree.depth, serial_steps)
            step += (times.heads if tree.depth > serial_steps else 0.0) + (0.0 if tree.chain else times.extra)
            speed = 1000 * batch * (1 + tree.accepted) / step
            return Choice(batch, tree, step, speed, speed / off)

        found.append(timed(Tree(0, (), 0.0)))
        for depth in range(1, len(rates) + 1):
            chain = best_tree(rates, depth, depth)
            assert chain is not None
            found.append(timed(chain))
        for size in nodes:
            trees = [best_tree(rates, depth, size) for depth in range(1, len(rates) + 1)]
            ways = [timed(tree) for tree in trees if tree is not None and not tree.chain]
            if ways:
                found.append(max(ways, key=lambda way: way.tokens_per_s))
    return found


def fastest(found: Sequence[Choice], batch: int, chain: bool) -> Choice:
    """The fastest tree at a batch size; with ``chain`` of the chains and no speculation."""
    return max(
        (one for one in found if one.batch == batch and one.tree.chain == chain), key=lambda one: one.tokens_per_s
    )


def verdict(found: Sequence[Choice]) -> str:
    """One sentence: at which batch sizes a tree gains the margin over the best chain, or that it does at none."""
    gains = {}
    for batch in dict.fromkeys(one.batch for one in found):
        tree, chain = fastest(found, batch, False), fastest(found, batch, True)
        gains[batch] = (tree.tokens_per_s / chain.tokens_per_s - 1, tree.tree.nodes)
    pays = {batch: of for batch, of in gains.items() if of[0] >= MARGIN}
    best, (gain, nodes) = max(gains.items(), key=lambda of: of[1])
    if not pays:
        return (
            f"A tree pays at no batch size: at best it is {gain:+.1%} against the best chain, with {nodes} nodes at "
            f"batch {best}, where {MARGIN:.0%} is asked."
        )
    said = ", ".join(f"{gain:+.1%} at batch {batch} ({nodes} nodes)" for batch, (gain, nodes) in pays.items())
    rest = [batch for batch in gains if batch not in pays]
    return f"A tree would pay against the best chain: {said}" + (
        f"; not at batch {', '.join(map(str, rest))}." if rest else "; at every batch size."
    )


def ranked_like(chain: Sequence[float], rates: Rates) -> list[list[float]]:
    """Rates of a drafter of which its chain's conditional accuracies alone are known.

    Its wrong first choices are taken to be ranked as those of ``rates``.
    """
    found = []
    for accuracy, ranks in zip(chain, checked(rates), strict=False):
        missed = 1 - ranks[0]
        found.append([accuracy, *((1 - accuracy) * value / missed if missed else 0.0 for value in ranks[1:])])
    return checked(found)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
