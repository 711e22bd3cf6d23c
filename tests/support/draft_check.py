"""Holds what an engine drafted to the equations: every draft of its requests, given the text verified before it.

The target's features come from transformers' plain pass over the whole text, or, for a target that transformers does
not run as the engine does (quantised, with adapters), from what the engine gave its drafter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from many_gumiho import AS_GIVEN, ManyDrafts, plain_target, reference_of
from many_moa import ManyMoa, moa_reference_of
from torch import Tensor

from vllm_gumiho.drafters.draft_weights import DraftWeights


@dataclass
class Draft:
    """One request's draft of one step.

    length: verified tokens before it, the newest of which no target pass has read.  tokens: the K drafted.
    spread: what they were drawn from where they were not the likeliest, ``[K, V]`` probabilities.
    temperature: of the request.  confidence: what adaptive verification takes for the chance of each token, ``[K]``,
    with the slope and the intercepts ``[K]`` that it was made with.
    """

    request: str
    length: int
    tokens: list[int]
    spread: Tensor | None = None
    temperature: float = 0.0
    confidence: tuple[Tensor, float, Tensor] | None = None

    @property
    def drawn(self) -> bool:
        """Whether its tokens were drawn from `spread`."""
        return self.spread is not None and self.temperature > 0


@dataclass
class Record:
    """What an engine drafted.  texts: all tokens of each request; features: the target's, by position, each ``[H]``.

    dropped: drafts of more than `most`, not kept.  wrong: what was seen to be wrong at once.
    """

    most: int = 400
    drafts: list[Draft] = field(default_factory=list)
    texts: dict[str, list[int]] = field(default_factory=dict)
    features: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    dropped: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, draft: Draft) -> None:
        if not draft.tokens:  # K is 0 in this step
            return
        if len(self.drafts) < self.most:
            self.drafts.append(draft)
        else:
            self.dropped += 1

    def finished(self) -> list[tuple[list[int], Draft]]:
        """Drafts of texts that are known so far, each after its verified tokens."""
        return [
            (self.texts[draft.request][: draft.length], draft)
            for draft in self.drafts
            if len(self.texts.get(draft.request, ())) >= draft.length
        ]


def _equations(target: Path, checkpoint: Path, weights: DraftWeights, rounded: frozenset[str]) -> ManyDrafts | ManyMoa:
    from vllm_gumiho.drafters.checkpoints import drafter_in
    from vllm_gumiho.drafters.moa import MOA

    if drafter_in(checkpoint) is MOA:
        return moa_reference_of(target, checkpoint)
    return reference_of(target, checkpoint, weights, rounded)


@torch.no_grad()
def check(
    record: Record,
    target: Path,
    checkpoint: Path,
    longest: int,
    exact: bool,
    engines_features: bool,
    weights: DraftWeights = AS_GIVEN,
    rounded: frozenset[str] = frozenset(),
) -> dict:
    """``compared``: draft tokens and distributions held to the equations; ``wrong``: what differs, in words.

    longest: the engine's max_model_len; tokens behind it are never verified.  exact: the engine computes in float32;
    else a token may be one that the equations like nearly as well.  engines_features: take the engine's.  weights,
    rounded: what the engine drafts by.
    """
    reference = _equations(target, checkpoint, weights, rounded)
    model = None if engines_features else plain_target(target)
    wrong = list(record.wrong)
    compared, rounding = 0, Rounding()
    by_request: dict[str, list[Draft]] = {}
    for _, draft in record.finished():
        by_request.setdefault(draft.request, []).append(draft)
    for request, drafts in by_request.items():
        # Later steps of the last drafts alone need the text's last token.
        tokens = torch.tensor(record.texts[request][: max(draft.length for draft in drafts)])
        if model is None:
            kept = record.features[request]
            features = torch.stack([kept[position] for position in range(len(tokens) - 1)]).float()
        else:
            features = reference.read(model, tokens[:-1])
        for width in {len(draft.tokens) for draft in drafts}:
            some = [draft for draft in drafts if len(draft.tokens) == width]
            drafted = torch.tensor([draft.tokens for draft in some])
            lengths = torch.tensor([draft.length for draft in some])
            logits = reference.logits(tokens, features, lengths, drafted)
            moved = [None] * len(some)
            if rounded and exact:
                near = perturbed(reference, tokens, features, lengths, drafted)
                moved = list(2 * torch.stack([spread(other - logits) for other in near]).amax(0))
                counted = torch.tensor([not draft.drawn for draft in some])[:, None] & (
                    lengths[:, None] + torch.arange(width) < longest
                )
                rounding.add(counted, logits, drafted, near)
            for draft, found, off in zip(some, logits, moved, strict=True):
                reached = max(0, min(width, longest - draft.length))
                compared += reached
                wrong += differences(draft, found[:reached], exact, bool(rounded), off) if reached else []
    wrong = rounding.wrong() + wrong
    return {"compared": compared, "requests": len(by_request), "wrong": wrong[:20], "dropped": record.dropped}


@dataclass
class Rounding:
    """How many draft tokens are not the equations' likeliest, and how many of those rounding makes others."""

    counted: int = 0
    unlike: int = 0
    chance: float = 0.0

    def add(self, counted: Tensor, logits: Tensor, drafted: Tensor, near: list[Tensor]) -> None:
        """counted, drafted ``[D, K]``; logits and those of `perturbed` ``[D, K, V]``."""
        likeliest = logits.argmax(-1)
        self.counted += int(counted.sum())
        self.unlike += int(((likeliest != drafted) & counted).sum())
        others = [int(((likeliest != other.argmax(-1)) & counted).sum()) for other in near]
        self.chance += sum(others) / len(others)

    def wrong(self) -> list[str]:
        # More than chance alone spreads: one input that is rounded another way moves the tokens of many drafts.
        if self.unlike <= 1.3 * self.chance + 4 * self.chance**0.5 + 3:
            return []
        return [f"{self.unlike} of {self.counted} tokens are not the likeliest; rounding moves {self.chance:.0f}"]


def perturbed(
    reference: ManyDrafts, tokens: Tensor, features: Tensor, lengths: Tensor, drafted: Tensor
) -> list[Tensor]:
    """Three draws of the logits ``[D, K, V]`` where features differ by what float32 sums differ by.

    An input near the middle of two int8 steps is rounded to either, 127ths of its row's largest apart, and moves what
    the next products round, in the drafts of all later tokens too.
    """
    draw = torch.Generator().manual_seed(0)
    noise = [1 + 1e-5 * torch.randn(features.shape, generator=draw) for _ in range(3)]
    return [reference.logits(tokens, features * one, lengths, drafted) for one in noise]


def spread(moves: Tensor) -> Tensor:
    """By how much two of the logits come apart, ``[..., V]`` -> ``[...]``; tokens that are never drafted give NaN."""
    moves = moves.nan_to_num(0.0)
    return moves.amax(-1) - moves.amin(-1)


def differences(
    draft: Draft, logits: Tensor, exact: bool, rounded: bool = False, moved: Tensor | None = None
) -> list[str]:
    """What is wrong with a draft by the reference's logits ``[K, V]``.

    moved ``[K]``: by how much rounding may move two of the logits apart.
    """
    where = f"request {draft.request}, after {draft.length} tokens"
    wrong = [] if draft.confidence is None else unlike_confidences(where, draft, logits)
    if draft.drawn:
        assert draft.spread is not None
        apart = (draft.spread[: len(logits)] - (logits / draft.temperature).softmax(-1)).abs().amax(-1)
        return wrong + [
            f"{where}: distribution {j} is {x:.4f} off"
            for j, x in enumerate(apart.tolist())
            if x > (2e-2 if rounded else 1e-3)
        ]
    # float32 sums in another order differ by 1e-5 of their size; bfloat16 rounds features to 1 part in 256, stage upon
    # stage.
    finite = logits[logits.isfinite()].abs().max()
    allowed = (3e-2 if not exact else 1e-2 if rounded else 1e-4) * finite.clamp(min=1.0).expand(len(logits))
    if moved is not None:
        allowed = allowed.maximum(moved[: len(logits)])
    tokens = torch.tensor(draft.tokens[: len(logits)])
    gaps = logits.amax(-1) - logits.gather(1, tokens[:, None])[:, 0]
    return wrong + [
        f"{where}: draft token {j} is {draft.tokens[j]}, not {int(logits[j].argmax())} ({gap:.4f} better)"
        for j, gap in enumerate(gaps.tolist())
        if not gap <= float(allowed[j])
    ]


def unlike_confidences(where: str, draft: Draft, logits: Tensor) -> list[str]:
    """By vLLM's formula: sigmoid(slope * log-odds of the likeliest token + intercept of the position)."""
    assert draft.confidence is not None
    found, slope, intercepts = draft.confidence
    heated = logits / (draft.temperature or 1.0)
    best = heated.softmax(-1).amax(-1).double()
    odds = (best / (1 - best)).log().clamp(-40, 40)
    wanted = (slope * odds + intercepts[: len(logits)]).sigmoid()
    apart = (found[: len(logits)] - wanted).abs().tolist()
    return [f"{where}: confidence {j} is {gap:.4f} off" for j, gap in enumerate(apart) if gap > 1e-3]
