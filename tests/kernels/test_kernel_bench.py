"""The benchmark, as far as a machine without a GPU goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from vllm_gumiho.kernels import bench
from vllm_gumiho.kernels.bench.cases import ArgmaxCase, HeadsCase, HeadsInputs
from vllm_gumiho.kernels.bench.draft_round import RoundCase

TINY_ROUND = RoundCase(2, 64, 96, 4, 2, vocab=101, heads=2, context=5, dtype=torch.float32, device="cpu")


def run_bench(*arguments: str, module: str = "") -> subprocess.CompletedProcess[str]:
    name = ".".join(filter(None, ("vllm_gumiho.kernels.bench", module)))
    command = [sys.executable, "-m", name, *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_dry_run(tmp_path):
    found = tmp_path / "results.json"
    run = run_bench("--dry-run", "--output", str(found))
    assert run.returncode == 0, run.stdout + run.stderr
    record = json.loads(found.read_text())
    assert "copy_gigabytes_per_second" not in record
    assert {row["method"] for row in record["rows"]} >= {"triton", "triton, one launch", "baddbmm", "nn.Linear loop"}
    for row in record["rows"]:
        assert row["error"] <= row["tolerance"]
        assert row["microseconds"] is None
    assert any(row["error"] > 0 for row in record["rows"])
    assert {row["operation"] for row in record["rows"]} == {"parallel_heads", "lm_head_argmax", "draft_round"}
    assert "GB/s" not in run.stdout


def test_every_tiling_is_run_and_held_to_the_reference(tmp_path):
    found = tmp_path / "tilings.json"
    run = run_bench("--dry-run", "--output", str(found), module="tilings")
    assert run.returncode == 0, run.stdout + run.stderr
    lines = json.loads(found.read_text())["lines"]
    shapes = {(line["heads"], line["weights"]) for line in lines}
    assert shapes == {(heads, weights) for heads in (2, 3) for weights in ("bf16", "fp8")}
    assert all(line["error"] <= line["tolerance"] and line["microseconds"] is None for line in lines)
    assert {line["tiling"]["spread"] for line in lines} == {False, True}
    for shape in shapes:
        of = [line for line in lines if (line["heads"], line["weights"]) == shape]
        (chosen,) = (line for line in of if line["chosen"])
        assert chosen["model"] <= 1.02 * min(line["model"] for line in of)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("module", ["", "tilings"])
def test_without_a_device(tmp_path, module):
    run = run_bench("--output", str(tmp_path / "none.json"), module=module)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "--dry-run" in run.stderr
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_wrong_results_are_not_timed(monkeypatch, factor):
    case = HeadsCase(hidden=32, batch=2, heads=2, dtype=torch.float32, device="cpu")
    loop = case.methods()["nn.Linear loop"]
    sets = [case.inputs(seed) for seed in range(3)]

    def wrong_once(inputs: HeadsInputs) -> torch.Tensor:
        return loop(inputs) * (factor if inputs is sets[1] else 1)

    timed = fake_graphs(monkeypatch, [30.0])
    runs = {"wrong": wrong_once, "right": loop}
    rows = {method: bench.check(case, sets, method, run) for method, run in runs.items()}
    bench.time_rows(case, sets, rows, runs, bench.Rates(copy=100.0, read=125.0))
    wrong, right = rows["wrong"], rows["right"]
    assert not wrong.right
    assert wrong.microseconds is None
    assert "WRONG" in wrong.line()
    assert right.right
    assert timed == [[3]]
    assert right.microseconds == 10.0
    assert right.gigabytes_per_second == pytest.approx(case.bytes("right") / 10e-6 / 1e9)
    assert right.share_of_copy == pytest.approx(right.gigabytes_per_second / 100)
    assert right.share_of_read == pytest.approx(right.gigabytes_per_second / 125)


def fake_graphs(monkeypatch, times: list[float], damage: float = 0.0) -> list[list[int]]:
    """Graphs whose replays take ``times``; how many calls were in each that was timed in turn with others."""
    timed: list[list[int]] = []

    def captured(calls):
        return SimpleNamespace(results=[call() + damage if damage else call() for call in calls])

    def in_turn(graphs):
        timed.append([len(graph.results) for graph in graphs])
        return times

    monkeypatch.setattr(bench.timing, "captured", captured)
    monkeypatch.setattr(bench.timing, "in_turn", in_turn)
    return timed


def test_what_the_last_replay_left_is_checked_too(monkeypatch):
    case = HeadsCase(hidden=32, batch=2, heads=2, dtype=torch.float32, device="cpu")
    runs, sets = {"loop": case.methods()["nn.Linear loop"]}, [case.inputs(0)]
    rows = {"loop": bench.check(case, sets, "loop", runs["loop"])}
    assert rows["loop"].right
    fake_graphs(monkeypatch, [10.0], damage=1.0)
    bench.time_rows(case, sets, rows, runs, bench.Rates(100.0, 100.0))
    assert "WRONG after its replays" in rows["loop"].line()
    assert rows["loop"].microseconds is None


def test_byte_budget():
    """Five heads at Llama-3-8B's size read 1,174 MB of weights, an LM head pass 1,051 MB."""
    assert HeadsCase(4096, 1).bytes("triton") / 1e6 == pytest.approx(1174.7, abs=0.5)
    assert HeadsCase(4096, 1).bytes("triton, fp8 weights") / 1e6 == pytest.approx(588, abs=1)
    assert ArgmaxCase(4096, 5).bytes("triton") / 1e6 == pytest.approx(1051, abs=1)
    assert RoundCase(1).bytes("triton") / 1e9 == pytest.approx(6.3, abs=0.05)


@pytest.mark.parametrize("hidden", [576, 2048, 4096, 8192])
def test_sets_exceed_the_cache(hidden):
    for l2 in (40 << 20, 50 << 20, 256 << 20):
        case = HeadsCase(hidden, 1)
        assert case.set_count(l2) >= 2
        assert case.set_count(l2) * case.bytes("fp8") >= 4 * l2


def test_every_asked_case_is_planned():
    planned = list(bench.plan(False, bench.HIDDEN_SIZES, bench.BATCHES))
    heads = {(c.hidden, c.batch) for c, compiled in planned if isinstance(c, HeadsCase) and not compiled}
    assert heads == {(h, b) for h in (576, 2048, 4096, 8192) for b in (1, 2, 4, 8, 16, 32, 64)}
    assert any(compiled for _, compiled in planned)
    rounds = {(c.batch, compiled) for c, compiled in planned if isinstance(c, RoundCase)}
    assert rounds == {(1, False), (8, False), (64, False), (1, True)}
    small = {(c.weights, c.vocab) for c, _ in planned if isinstance(c, RoundCase) and c.batch == 1}
    assert small == {(w, v) for w in ("bf16", "fp8", "int8") for v in (128_256, 32_000)}
    assert RoundCase(1, weights="fp8", vocab=32_000).bytes("") / 1e9 == pytest.approx(1.97, abs=0.01)


def test_what_the_kernels_do_not_take_is_not_timed_as_theirs():
    """Above 32 requests and 64 rows serving takes the library, which is a baseline already."""
    for batch, ours in ((32, True), (33, False)):
        methods = HeadsCase(64, batch, 2, device="cpu").methods()
        assert ("triton" in methods) is ours
        assert "baddbmm" in methods
    for rows, ours in ((64, True), (65, False)):
        assert ("triton" in ArgmaxCase(64, rows, device="cpu").methods()) is ours


def test_a_round_is_put_beside_its_bytes_and_a_target_pass(monkeypatch):
    """4.2 TB/s: 6.29 GB take 1.5 ms, a target pass 3.6 ms."""
    assert RoundCase(1).at_copy_bandwidth("triton", 1800.0, 4200.0) == pytest.approx((1.2, 0.504), abs=0.005)
    runs, sets = {"library": TINY_ROUND.methods()["library calls"]}, [TINY_ROUND.inputs(0)]
    rows = {"library": bench.check(TINY_ROUND, sets, "library", runs["library"])}
    fake_graphs(monkeypatch, [1800.0])
    bench.time_rows(TINY_ROUND, sets, rows, runs, bench.Rates(100.0, 100.0))
    row = rows["library"]
    assert row.times_of_bytes == pytest.approx(1800.0 / (TINY_ROUND.bytes("") / 100.0 / 1e3))
    assert f"{row.times_of_bytes:.2f} x its bytes" in row.line()


@pytest.mark.parametrize("part", ["tokens", "fused", "hidden", "z", "caches", "position"])
def test_a_wrong_part_of_a_round_is_found(part):
    """Each part of the result is checked; ``position``: the second step at the place of the first."""
    inputs, run = TINY_ROUND.inputs(0), TINY_ROUND.methods()["library calls"]
    right = run(inputs)
    error, tolerance = TINY_ROUND.check("", right, inputs)
    assert error <= tolerance
    if part == "tokens":
        wrong = right._replace(tokens=right.tokens.roll(1, dims=1))
    elif part == "z":
        wrong = right._replace(z=right.z.flip(0))
    elif part == "position":
        moved = inputs._replace(rotations=inputs.rotations[[0, 0]])
        wrong = run(moved)
    else:
        changed = [t.clone() for t in getattr(right, part)]
        changed[1].view(-1)[7] += 0.1
        wrong = right._replace(**{part: changed})
    error, tolerance = TINY_ROUND.check("", wrong, inputs)
    assert not error <= tolerance
