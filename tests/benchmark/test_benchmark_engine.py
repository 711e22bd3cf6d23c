"""The benchmark on real engines and a real server: a tiny random target, and the embedded one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from vllm_gumiho.benchmark.grid import Grid, Variant
from vllm_gumiho.benchmark.run import run
from vllm_gumiho.benchmark.shapes import SHAPES, write_models
from vllm_gumiho.engines.server import serve
from vllm_gumiho.errors import EngineError

pytestmark = pytest.mark.engine
K, OUTPUT_LEN = 3, 12
ENGINE = (
    "--load-format",
    "dummy",
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    "64",
    "--seed",
    "0",
    "--max-num-seqs",
    "2",
    "--no-enable-prefix-caching",
)
REQUESTS = (
    "--dataset-name",
    "random",
    "--input-len",
    "8",
    "--output-len",
    str(OUTPUT_LEN),
    "--ignore-eos",
    "--temperature",
    "0",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return write_models(SHAPES["tiny"], tmp_path_factory.mktemp("models"))


def drafting(folders: dict[str, Path]) -> Variant:
    return Variant("gumiho", K, {"method": "gumiho", "model": str(folders["gumiho"]), "num_speculative_tokens": K})


def test_offline_cells_are_measured_kept_and_not_run_again(folders, tmp_path, monkeypatch):
    lost = Variant("eagle", K, {"method": "eagle", "model": str(tmp_path / "none"), "num_speculative_tokens": K})
    grid = Grid(
        str(folders["target"]),
        (Variant("none"), drafting(folders), lost),
        ENGINE,
        REQUESTS,
        ("offline",),
        (1, 2),
        2,
        1,
        profile_steps=3,
    )
    report = run(grid, tmp_path / "out", Console(quiet=True))
    cells = {(one["label"], one["concurrency"]): one for one in report["cells"]}
    assert len(cells) == 6
    for (label, concurrency), one in cells.items():
        if label == lost.label:
            assert (one["status"], "output_tokens_per_s" in one) == ("failed", False)
            assert str(tmp_path / "none") in one["reason"]
            continue
        assert (one["status"], one["requests"]) == ("ok", 2 * concurrency)
        assert one["output_tokens"] == 2 * concurrency * OUTPUT_LEN
        assert one["output_tokens_per_s"] == pytest.approx(one["output_tokens"] / one["seconds"])
        assert 0 < one["tpot_ms"]["p50"] <= one["tpot_ms"]["p95"]
        assert 0 < one["ttft_ms"]["p50"] <= one["ttft_ms"]["p95"]
        assert one["step_ms"]["verify"] > 0
    off, on = cells["off", 2], cells[f"gumiho K={K}", 2]
    assert (off["step_ms"]["draft"], off["drafts"], off["acceptance_per_position"]) == (0, 0, [])
    assert on["step_ms"]["draft"] > 0
    assert on["drafts"] > 0
    assert len(on["acceptance_per_position"]) == K
    assert on["answers"] == off["answers"]
    rows = {(row["label"], row["concurrency"]): row for row in report["summary"]}
    assert rows[f"gumiho K={K}", 2]["speedup"] == on["output_tokens_per_s"] / off["output_tokens_per_s"]
    assert rows[lost.label, 1]["reason"] == cells[lost.label, 1]["reason"]

    # With time for no engine, finished cells are still there: nothing is run twice.
    again = run(grid, tmp_path / "out", Console(quiet=True), max_minutes=-1)
    assert [one for one in again["cells"] if one["status"] == "ok"] == [
        one for one in report["cells"] if one["status"] == "ok"
    ]


@pytest.mark.long
def test_a_server_is_measured_by_vllms_own_client(folders, tmp_path):
    grid = Grid(str(folders["target"]), (Variant("none"), drafting(folders)), ENGINE, REQUESTS, ("server",), (2,), 4, 1)
    report = run(grid, tmp_path / "out", Console(quiet=True))
    off, on = report["cells"]
    for one in (off, on):
        assert one["status"] == "ok", one
        assert one["output_tokens"] == 4 * OUTPUT_LEN
        assert one["output_tokens_per_s"] == pytest.approx(one["output_tokens"] / one["seconds"])
        assert 0 < one["tpot_ms"]["p50"] <= one["tpot_ms"]["p95"]
    assert (off["drafts"], off["acceptance_length"]) == (0, 1)
    assert on["drafts"] > 0
    assert on["acceptance_length"] == pytest.approx(1 + sum(on["acceptance_per_position"]))
    assert on["answers"] == off["answers"]


@pytest.mark.long
def test_a_server_that_does_not_start_says_why(tmp_path):
    message = "the server ended with 1: .*no-such-folder"
    with pytest.raises(EngineError, match=message), serve([str(tmp_path / "no-such-folder")], tmp_path / "log"):
        pass


@pytest.mark.long
def test_the_gpu_script_goes_through_on_a_cpu(tmp_path):
    """Model runner V2 in Triton's interpreter, as vLLM's CPU sampler has no synthetic acceptance."""
    command = [
        sys.executable,
        "-m",
        "vllm_gumiho.benchmark.shapes",
        "--dry-run",
        "--output",
        str(tmp_path),
        "--repeats",
        "1",
        "--num-speculative-tokens",
        "7",
        "--concurrency",
        "2",
        "--input-len",
        "8",
        "--output-len",
        "24",
    ]
    env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "tiny" / "report.json").read_text())
    assert "ASSUMED" in report["assumed"]
    assert "DRY RUN" in report["assumed"]
    cells = {one["method"]: one for one in report["cells"]}
    assert cells.keys() == {"none", "eagle", "gumiho"}
    for method in ("eagle", "gumiho"):
        assert cells[method]["model_runner"] == "V2"
        # Random weights would be accepted next to never.
        assert cells[method]["acceptance_per_position"][0] > 0.3
