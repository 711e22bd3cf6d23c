"""``vllm-gumiho tree-gate``: its dry run on the CPU, and what it says of times."""

from __future__ import annotations

import json

import pytest

from vllm_gumiho.errors import GpuCheckError
from vllm_gumiho.gpu_check.tree_gate import ALLOWED, DRY, Grid, judge, tree_gate

# ms of a pass over 8 rows of a request, and what each more costs beyond as many rows as are free.
BASE, FREE = 5.2, 100


@pytest.mark.engine
@pytest.mark.long
def test_the_dry_run_times_every_cell(tmp_path, capsys):
    tree_gate(output=tmp_path, dry_run=True)
    report = json.loads((tmp_path / "report.json").read_text())
    cells = {(cell["rows"], cell["batch"], cell["context"]) for cell in report["cells"]}
    assert cells == {(rows, batch, context) for rows in DRY.rows for batch in DRY.batches for context in DRY.contexts}
    assert all(cell["ms"] == cell["forward"] + cell["logits"] > 0 for cell in report["cells"])
    assert {(check["batch"], check["context"]) for check in report["checks"]} == {
        (b, c) for b in (1, 4) for c in DRY.contexts
    }
    assert not report["go"]
    assert report["dry_run"]
    said = " ".join(capsys.readouterr().out.split())
    assert "DRY RUN, no result. Not judged, as not every pass was one CUDA graph" in said


def cells(ms, full_graph: bool = True) -> list[dict]:
    grid = Grid()
    return [
        {"rows": rows, "batch": batch, "context": context, "ms": ms(rows, batch, context), "full_graph": full_graph}
        for rows in grid.rows
        for batch in grid.batches
        for context in grid.contexts
    ]


def test_rows_that_cost_nothing_are_a_go_with_a_condition():
    found = judge(cells(lambda rows, batch, context: BASE + 0.02 * max(0, rows * batch - FREE)), Grid())
    assert found["go"]
    assert len(found["checks"]) == len(ALLOWED) * 2
    assert found["verdict"].startswith("Go, as far as rows are concerned: 17 rows of a request against 8 cost +0.0%")
    assert "only where the chain itself pays" in found["verdict"]


@pytest.mark.parametrize(
    ("batch", "context", "cost", "go"),
    [
        (1, 512, 0.059, True),
        (1, 512, 0.061, False),
        (4, 4096, 0.079, True),
        (4, 4096, 0.081, False),
        (16, 512, 9.0, True),
    ],
)
def test_a_limit_holds_at_each_batch_and_context(batch, context, cost, go):
    def ms(rows: int, of: int, behind: int) -> float:
        return BASE * (1 + cost * (rows == 17 and (of, behind) == (batch, context)))

    found = judge(cells(ms), Grid())
    assert found["go"] == go
    if not go:
        assert f"+{cost:.1%} at batch {batch}, context {context}" in found["verdict"]
        assert found["verdict"].startswith("No: ")


def test_times_without_graphs_are_not_judged():
    found = judge(cells(lambda *_: BASE, full_graph=False), Grid())
    assert not found["go"]
    assert found["verdict"].startswith("Not judged, as not every pass was one CUDA graph")


def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(GpuCheckError, match="PyTorch sees none; --dry-run goes through it on the CPU"):
        tree_gate(output=tmp_path)
