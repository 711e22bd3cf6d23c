"""Training data: the target's own answers, packed into rows without padding between sequences.

One JSON object a line: ``{"id", "turns": [{"prompt": [token ids], "answer": [token ids]}, ...]}``, as
``vllm-gumiho generate`` writes; a later turn's prompt holds what follows the answer before it.  The short form
``{"id", "prompt", "answer"}`` is one turn.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vllm_gumiho.errors import DataError
from vllm_gumiho.files import json_lines_files, lines_of

OPEN_ROWS = 256


@dataclass(frozen=True)
class Sample:
    """One conversation: (prompt, answer) token ids of each turn.  kind: the name of the file it was read from."""

    id: str
    turns: tuple[tuple[list[int], list[int]], ...]
    kind: str = ""

    def __len__(self) -> int:
        return sum(len(prompt) + len(answer) for prompt, answer in self.turns)

    def tokens(self) -> tuple[list[int], list[bool]]:
        """All token ids, and which of them the target wrote."""
        ids: list[int] = []
        answered: list[bool] = []
        for prompt, answer in self.turns:
            ids += prompt + answer
            answered += [False] * len(prompt) + [True] * len(answer)
        return ids, answered

    @property
    def answer_tokens(self) -> int:
        """How many tokens the target wrote."""
        return sum(len(answer) for _, answer in self.turns)


def read_samples(paths: Iterable[Path], vocab_size: int, left_out: Counter[str] | None = None) -> list[Sample]:
    """All samples of the files (a folder stands for its ``*.jsonl``), first of each id and of each first prompt.

    left_out: counts those that are not taken, by the reason.

    Raises: DataError for a file that is not there, a line that is no sample, a token outside the vocabulary, or where
    none is left.
    """
    left_out = Counter() if left_out is None else left_out
    paths = list(paths)
    files = json_lines_files(paths)
    samples: dict[str, Sample] = {}
    asked: set[tuple[int, ...]] = set()
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file of training samples; make one with 'vllm-gumiho generate'")
        for number, line in lines_of(file.read_text(encoding="utf-8")):
            try:
                sample = _sample(json.loads(line), file.stem)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{file}:{number}: not a training sample ({error!r}); make one with 'vllm-gumiho generate'"
                ) from error
            if any(not 0 <= token < vocab_size for token in sample.tokens()[0]):
                raise DataError(f"{file}:{number}: token id outside the target's vocabulary of {vocab_size}")
            first_prompt, first_answer = sample.turns[0]
            repeated = sample.id in samples or tuple(first_prompt) in asked
            if reason := _unusable(first_prompt, first_answer) or (REPEATED if repeated else None):
                left_out[reason] += 1
                continue
            samples[sample.id] = sample
            asked.add(tuple(first_prompt))
    if not samples:
        read = ", ".join(map(str, files)) or f"{', '.join(map(str, paths))}, which has no *.jsonl file"
        why = f" ({in_words(left_out)})" if left_out else ""
        raise DataError(f"no training samples in {read}{why}; make some with 'vllm-gumiho generate'")
    return list(samples.values())


NO_PROMPT, SHORT, REPEATED = "without a prompt", "with a first answer of fewer than 2 tokens", "repeats"
CUT_AWAY = "with fewer than 2 answer tokens within --row-length"


def _unusable(prompt: list[int], answer: list[int]) -> str | None:
    """Why a conversation that begins so teaches nothing, None where it does."""
    return NO_PROMPT if not prompt else SHORT if len(answer) < 2 else None


def in_words(left_out: Mapping[str, int]) -> str:
    """What was left out and why, as ``3 repeats, 1 without a prompt``."""
    return ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)


def _sample(raw: Any, kind: str) -> Sample:
    turns = raw.get("turns", [raw])
    return Sample(str(raw["id"]), tuple((list(turn["prompt"]), list(turn["answer"])) for turn in turns), kind)


def split_held_out(samples: list[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(train, held-out) split of each kind, at least one held out of it.

    A sample's place is decided by its id and the seed, so that data may be added later without one changing sides.
    """

    def place(sample: Sample) -> float:
        return random.Random(f"{seed}:{sample.id}").random()

    held_out = {min(of, key=place).id for of in by_kind(samples).values()}
    held_out |= {sample.id for sample in samples if place(sample) < fraction}
    order = sorted(samples, key=place)
    return [s for s in order if s.id not in held_out], [s for s in order if s.id in held_out]


def by_kind(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples of each kind, kinds in alphabetical order."""
    kinds: dict[str, list[Sample]] = {}
    for sample in samples:
        kinds.setdefault(sample.kind, []).append(sample)
    return dict(sorted(kinds.items()))


def mixed(samples: list[Sample], shares: dict[str, float], seed: int) -> list[Sample]:
    """One epoch whose answer tokens are of kinds in proportion to ``shares``, about as many as the samples have.

    A kind's samples are taken as often as that needs: all of them the whole times, some of them once more.  A kind
    without a share is left out; no shares at all take every sample once.

    Raises: DataError for a share of a kind that there is not.
    """
    if not shares:
        return samples
    kinds = by_kind(samples)
    unknown = ", ".join(sorted(set(shares) - set(kinds)))
    if unknown:
        raise DataError(f"shares of {unknown}: no such kind of data; kinds are the files' names: {', '.join(kinds)}")
    tokens = {kind: sum(sample.answer_tokens for sample in of) for kind, of in kinds.items()}
    total = sum(tokens[kind] for kind in shares)
    taken = []
    for kind, share in shares.items():
        times = share / sum(shares.values()) * total / tokens[kind]
        draw = random.Random(f"{seed}:{kind}")
        for sample in kinds[kind]:
            taken += [sample] * (int(times) + (draw.random() < times % 1))
    return taken


def answer_counts(samples: Iterable[Sample], vocab_size: int) -> Tensor:
    """How often each token is an answer token, ``[V]`` int64."""
    return _counts((sample.tokens() for sample in samples), vocab_size)


def answer_counter(paths: Iterable[Path]) -> Callable[[int], Tensor]:
    """`answer_counts` of the answers in these files, for a vocabulary that is not known yet.  Raises: DataError."""
    return lambda vocab_size: answer_counts(read_samples(paths, vocab_size), vocab_size)


def _counts(sequences: Iterable[tuple[list[int], list[bool]]], vocab_size: int) -> Tensor:
    answers = [token for tokens, answered in sequences for token in compress(tokens, answered)]
    return torch.bincount(torch.tensor(answers, dtype=torch.long), minlength=vocab_size)


def segment_spans(segments: Tensor) -> list[tuple[int, int, int]]:
    """``(row, start, stop)`` of every sequence of rows ``[R, T]``, padding (0) left out, in the rows' order."""
    numbers = segments.cpu().numpy()
    found = []
    for row, line in enumerate(numbers):
        edges = np.flatnonzero(np.diff(line, prepend=0, append=0))
        found += [(row, int(a), int(b)) for a, b in pairwise(edges) if line[a] > 0]
    return found


class PackedRows(Dataset):
    """Sequences laid end to end in rows of ``row_length`` tokens; a sequence never crosses a row.

    An item: ``input_ids``, ``positions``, ``segments`` (0 = padding at a row's end) and ``answer`` (bool), each
    ``[row_length]``, and ``index``, the row's number.  A conversation is cut at ``row_length`` tokens; ``cut_away``
    counts those that then have no answer left.
    """

    def __init__(self, samples: list[Sample], row_length: int):
        self.row_length = row_length
        self.cut_away = 0
        rows: list[list[tuple[list[int], list[bool]]]] = []
        room: list[int] = []
        for sample in samples:
            ids, answered = sample.tokens()
            ids, answered = ids[:row_length], answered[:row_length]
            if sum(answered) < 2:
                self.cut_away += 1
                continue
            fitting = [r for r in range(max(0, len(rows) - OPEN_ROWS), len(rows)) if room[r] >= len(ids)]
            if fitting:
                r = min(fitting, key=room.__getitem__)
            else:
                r = len(rows)
                rows.append([])
                room.append(row_length)
            rows[r].append((ids, answered))
            room[r] -= len(ids)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def of_kinds(samples: list[Sample], row_length: int, most: int) -> tuple[PackedRows, list[str]]:
        """Rows of one kind each, at most ``most`` of it, and the kind of every row."""
        together, kinds = PackedRows([], row_length), []
        for kind, of in by_kind(samples).items():
            mine = PackedRows(of, row_length)
            together.rows += mine.rows[:most]
            together.cut_away += mine.cut_away
            kinds += [kind] * len(mine.rows[:most])
        return together, kinds

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, positions, segments, answer = (np.zeros(self.row_length, np.int64) for _ in range(4))
        start = 0
        for number, (tokens, answered) in enumerate(self.rows[index], 1):
            stop = start + len(tokens)
            ids[start:stop] = tokens
            positions[start:stop] = np.arange(len(tokens))
            segments[start:stop] = number
            answer[start:stop] = answered
            start = stop
        return {
            "input_ids": torch.from_numpy(ids),
            "positions": torch.from_numpy(positions),
            "segments": torch.from_numpy(segments),
            "answer": torch.from_numpy(answer.astype(bool)),
            "index": torch.tensor(index),
        }

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token is an answer token, ``[V]`` int64."""
        return _counts((sequence for row in self.rows for sequence in row), vocab_size)
