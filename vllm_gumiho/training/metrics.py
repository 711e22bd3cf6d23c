"""Held-out agreement of a drafter with the data: over all of it, and by kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def acceptance_metrics(kinds: list[str]) -> Callable[[Any], dict[str, float]]:
    """The metrics of an evaluation whose rows are of these kinds, in order; with several kinds, of each kind too.

    Accuracy and acceptance per draft position, and the acceptance length of the whole chain (T = 0).
    """

    def metrics(prediction: Any) -> dict[str, float]:
        counts, rows = np.asarray(prediction.predictions), np.asarray(prediction.label_ids).reshape(-1)
        found = of(counts.sum(0))
        names = sorted(set(kinds)) if len(set(kinds)) > 1 else []
        for name in names:
            mine = np.array([kinds[row] == name for row in rows])
            found |= {f"{name}_{key}": value for key, value in of(counts[mine].sum(0)).items()}
        return found

    def of(counts: Any) -> dict[str, float]:
        """counts ``[3, K]``: seen, right, accepted."""
        seen, right, accepted = counts
        found = {"acceptance_length": 1.0 + float(accepted.sum()) / max(1, int(seen[0]))}
        for i in range(len(seen)):
            found[f"accuracy_{i + 1}"] = float(right[i]) / max(1, int(seen[i]))
            found[f"accepted_{i + 1}"] = float(accepted[i]) / max(1, int(seen[0]))
        return found

    return metrics
