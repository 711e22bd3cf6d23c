"""What README.md says of features is what docs/features.md has rows and tests for."""

from __future__ import annotations

from feature_list import FEATURES, RUNNERS, marks
from places import ROOT

LINES = (ROOT / "README.md").read_text().splitlines()
TABLE = LINES[LINES.index("| feature | state |") + 2 :]
ROWS = [line.strip("| ").split(" | ") for line in TABLE[: TABLE.index("")]]
# Rows that say in which model runners their features are proven.
PROVEN = [
    (names.split(", "), set(state.split(", "))) for names, state in ROWS if set(state.split(", ")) <= set(RUNNERS)
]
NAMED = {
    "continuous batching", "greedy and probabilistic drafts", "K by batch size", "chunked prefill", "prefix caching",
    "preemption", "stop strings", "penalties", "logprobs", "structured output", "LoRA adapters", "tensor parallel",
    "data parallel",
}  # fmt: skip


def test_every_feature_that_the_readme_names_has_a_row_and_so_a_test():
    names = [name for names, _ in PROVEN for name in names]
    assert set(names) >= NAMED
    assert [name for name in names if not any(name in feature for feature in FEATURES)] == []
    assert any("(docs/features.md)" in line for line in LINES)


def test_a_feature_is_proven_in_the_runners_that_the_readme_says():
    proofs = marks()
    for names, runners in PROVEN:
        for name in names:
            proven = [set(proofs[feature]) for feature in FEATURES if name in feature]
            assert any(runners <= found for found in proven), f"{name}: {runners}, proven in {proven}"
            assert not any(runners < found for found in proven), f"{name}: proven in {proven}, README says {runners}"


def test_no_feature_is_called_tested_by_hand():
    """Which ones are is read from the tests, in docs/features.md."""
    assert len(ROWS) > 3
    assert [row for row in ROWS if "tested" in " ".join(row).lower()] == []
