"""How often the target's token is the drafter's first, second, ... choice: what a tree of drafts would be right about.

At draft position i, of the drafts whose tokens before i were all right: the rank of the target's token among the
choices of the step or head that drafted position i.  The other choices cost a top-k of logits that drafting has no need
of; they are looked at in a measuring mode alone, and nothing that is drafted changes.

Where the target's token was another choice than the first, the next position has been drafted after the wrong token.
How often its own choices are right all the same says what a child of a sibling would be worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_gumiho.engines.record import watch_drafts

RANKS = 8


class RankHits:
    """Counts by position, of K positions, and rank, of `RANKS`.

    reached: drafts that were right before the position, and whose target's token there is known.  hits: of these, how
    often it was each rank.  after_sibling: of drafts whose target's token at a position was rank 2 or below, how many
    there were, and how often the first choice of the next position was right.
    """

    def __init__(self, length: int):
        self.reached = [0] * length
        self.hits = [[0] * RANKS for _ in range(length)]
        self.after_sibling = [[0, 0] for _ in range(length - 1)]

    def add(self, choices: Sequence[Sequence[int]], truth: Sequence[int]) -> None:
        """Of one draft: each position's choices, best first, the drafted one first of all; the target's own tokens."""
        for position, (ranked, token) in enumerate(zip(choices, truth, strict=False)):
            self.reached[position] += 1
            rank = ranked.index(token) if token in ranked else None
            if rank is not None:
                self.hits[position][rank] += 1
            if rank == 0:
                continue
            if rank is not None and position + 1 < min(len(choices), len(truth)):
                self.after_sibling[position][0] += 1
                self.after_sibling[position][1] += choices[position + 1][0] == truth[position + 1]
            break

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {"reached": self.reached, "hits": self.hits, "after_sibling": self.after_sibling}


class Watch:
    """Counts what an engine of this process drafts from now on, by the texts that its requests end with.

    The draft model's tokens are asked for in Python, once a serial pass and once for all heads: the engine must run
    without CUDA graphs.
    """

    def __init__(self, llm: Any):
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self._drafter = getattr(runner, "drafter", None) or runner.speculator
        self._length: int = llm.llm_engine.vllm_config.speculative_config.num_speculative_tokens
        self._found: list[Any] = []
        self._drafts: dict[str, list[tuple[int, list[list[int]]]]] = {}
        self._keep_choices()
        watch_drafts(llm, self._add)
        self._count_at_the_end(llm.llm_engine.engine_core.engine_core.scheduler)
        self.begin()

    def begin(self) -> None:
        """Count from nothing."""
        self.hits = RankHits(self._length)
        self._drafts.clear()

    def _keep_choices(self) -> None:
        model, propose = self._drafter.model, self._drafter.propose
        best = model.get_top_tokens

        def get_top_tokens(hidden_states: Any) -> Any:
            tokens = best(hidden_states)
            self._found.append((tokens, model.compute_logits(hidden_states).topk(RANKS).indices))
            return tokens

        def proposing(*args: Any, **kwargs: Any) -> Any:
            self._found.clear()
            return propose(*args, **kwargs)

        model.get_top_tokens, self._drafter.propose = get_top_tokens, proposing

    def _add(self, request: str, text: list[int], tokens: list[int], row: int) -> None:
        """The choices for one draft: of the row in each pass, of one row a head in the last."""
        requests = self._found[0][0].shape[0]
        choices = []
        for drafted, ranked in self._found:
            each = ranked.shape[0] // requests
            rows = slice(row * each, (row + 1) * each)
            for first, others in zip(drafted[rows].tolist(), ranked[rows].tolist(), strict=True):
                choices.append([first, *(token for token in others if token != first)][:RANKS])
        assert [ranked[0] for ranked in choices] == tokens, "the choices are not those of this draft"
        self._drafts.setdefault(request, []).append((len(text), choices))

    def _count_at_the_end(self, scheduler: Any) -> None:
        free = scheduler._free_request

        def counting(request: Any, *args: Any, **kwargs: Any) -> Any:
            text = list(request.all_token_ids)
            for begin, choices in self._drafts.pop(request.request_id, ()):
                self.hits.add(choices, text[begin:])
            return free(request, *args, **kwargs)

        scheduler._free_request = counting


def add_up(sets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of several sets together, and ``rates [K][RANKS]``: unweighted means over the sets that reached there."""
    length = len(sets[0]["reached"])
    total: dict[str, Any] = {
        "reached": [sum(one["reached"][i] for one in sets) for i in range(length)],
        "hits": [[sum(one["hits"][i][rank] for one in sets) for rank in range(RANKS)] for i in range(length)],
        "after_sibling": [[sum(one["after_sibling"][i][j] for one in sets) for j in (0, 1)] for i in range(length - 1)],
    }
    total["rates"] = []
    for i in range(length):
        there = [one for one in sets if one["reached"][i]]
        total["rates"].append(
            [
                sum(one["hits"][i][rank] / one["reached"][i] for one in there) / len(there) if there else None
                for rank in range(RANKS)
            ]
        )
    return total
