"""Training data: the target's own answers, packed into rows without padding between sequences.

One JSON object a line: ``{"id", "prompt": [token ids], "answer": [token ids]}``, as ``vllm-gumiho generate`` writes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

OPEN_ROWS = 256


class DataError(ValueError):
    """A data file that cannot be trained on; the message names the file and the line."""


@dataclass(frozen=True)
class Sample:
    id: str
    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def read_samples(paths: Iterable[Path], vocab_size: int) -> list[Sample]:
    """All samples of the files (a folder stands for its ``*.jsonl``), first of each id.

    Raises: DataError for a file that is not there, a line that is no sample, or a token outside the vocabulary.
    """
    files = [f for path in map(Path, paths) for f in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    samples: dict[str, Sample] = {}
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file of training samples; make one with 'vllm-gumiho generate'")
        for number, line in enumerate(file.read_text().split("\n"), 1):
            if not line.strip():
                continue
            try:
                raw = json.loads(line)
                sample = Sample(str(raw["id"]), list(raw["prompt"]), list(raw["answer"]))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{file}:{number}: not a training sample ({error!r}); make one with 'vllm-gumiho generate'"
                ) from error
            if any(not 0 <= token < vocab_size for token in sample.prompt + sample.answer):
                raise DataError(f"{file}:{number}: token id outside the target's vocabulary of {vocab_size}")
            if sample.prompt and len(sample.answer) > 1:
                samples.setdefault(sample.id, sample)
    if not samples:
        raise DataError(f"no training samples in {', '.join(map(str, files)) or 'no files'}")
    return list(samples.values())


def split_held_out(samples: list[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Deterministic (train, held-out) split, by sample."""
    order = sorted(samples, key=lambda s: s.id)
    random.Random(seed).shuffle(order)
    held_out = max(1, round(len(order) * fraction))
    return order[held_out:], order[:held_out]


class PackedRows(Dataset):
    """Sequences laid end to end in rows of ``row_length`` tokens; a sequence never crosses a row.

    An item: ``input_ids``, ``positions``, ``segments`` (0 = padding at a row's end) and ``answer`` (bool), each
    ``[row_length]``, and ``index``, the row's number (from ``first_index``), for a feature cache.
    """

    def __init__(self, samples: list[Sample], row_length: int, first_index: int = 0):
        self.row_length, self.first_index = row_length, first_index
        rows: list[list[Sample]] = []
        room: list[int] = []
        for sample in samples:
            sample = Sample(sample.id, sample.prompt, sample.answer[: max(0, row_length - len(sample.prompt))])
            if len(sample.answer) < 2:
                continue
            fitting = [r for r in range(max(0, len(rows) - OPEN_ROWS), len(rows)) if room[r] >= len(sample)]
            if fitting:
                r = min(fitting, key=room.__getitem__)
            else:
                r = len(rows)
                rows.append([])
                room.append(row_length)
            rows[r].append(sample)
            room[r] -= len(sample)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, positions, segments, answer = (np.zeros(self.row_length, np.int64) for _ in range(4))
        start = 0
        for number, sample in enumerate(self.rows[index], 1):
            stop = start + len(sample)
            ids[start:stop] = sample.prompt + sample.answer
            positions[start:stop] = np.arange(len(sample))
            segments[start:stop] = number
            answer[start + len(sample.prompt) : stop] = 1
            start = stop
        return {
            "input_ids": torch.from_numpy(ids),
            "positions": torch.from_numpy(positions),
            "segments": torch.from_numpy(segments),
            "answer": torch.from_numpy(answer.astype(bool)),
            "index": torch.tensor(self.first_index + index),
        }

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token is an answer token, ``[V]`` int64."""
        counts = np.zeros(vocab_size, np.int64)
        for row in self.rows:
            for sample in row:
                np.add.at(counts, sample.answer, 1)
        return torch.from_numpy(counts)
