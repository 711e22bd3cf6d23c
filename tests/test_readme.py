"""What README.md says of features is what docs/features.md has rows and tests for."""

from __future__ import annotations

from pathlib import Path

from feature_list import FEATURES

LINES = (Path(__file__).parents[1] / "README.md").read_text().splitlines()


def test_every_feature_that_the_readme_names_has_a_row_and_so_a_test():
    (row,) = (line for line in LINES if line.startswith("| continuous batching, "))
    names, state = row.strip("| ").split(" | ")
    assert "(docs/features.md)" in state
    named = names.split(", ")
    assert named.pop() == "…"
    assert [name for name in named if not any(name in feature for feature in FEATURES)] == []


def test_no_feature_is_called_tested_by_hand():
    """Which ones are is read from the tests, in docs/features.md."""
    table = LINES[LINES.index("| feature | state |") :]
    rows = table[: table.index("")]
    assert len(rows) > 3
    assert [row for row in rows if "tested" in row.lower()] == []
