"""The kernels compiled for GPUs that are not there, and the tile arithmetic and barrier protocol they rest on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest

from vllm_gumiho.kernels.aot import TARGETS
from vllm_gumiho.kernels.parallel_heads.reference import HEAD_STAGES
from vllm_gumiho.kernels.parallel_heads.tiling import balance, batch_tile, choose_tiling

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target, tmp_path):
    found = tmp_path / "reports.json"
    run = run_python(
        "-m",
        "vllm_gumiho.kernels.aot",
        "--target",
        target,
        "--batch",
        "1",
        "64",
        "--dtype",
        "bf16:bf16",
        "bf16:fp8",
        "--output",
        str(found),
    )
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    reports = json.loads(found.read_text())
    assert {r["kernel"] for r in reports} == {"parallel_heads", "partial_argmax", "reduce_argmax"}
    for report in reports:
        assert report["spills"] == 0
        assert 0 < report["registers"] <= 255
        assert report["shared"] <= report["shared_limit"] <= TARGETS[target].shared_per_program


def test_barrier_instructions():
    """The compiled barrier releases and acquires at GPU scope, and inputs of a stage come past the L1 cache."""
    code = """
from vllm_gumiho.kernels import aot
from vllm_gumiho.kernels.parallel_heads.triton import parallel_heads_kernel
kept, compile_ = [], aot._compile
aot._compile = lambda *a, **k: kept.append(compile_(*a, **k)) or kept[-1]
list(aot.heads_reports("cuda:90", 4096, 1, "bf16", "bf16"))
print(kept[0].metadata.launch_cooperative_grid)
print(kept[0].asm["ptx"])
"""
    run = run_python("-c", code)
    assert run.returncode == 0, run.stderr[-3000:]
    cooperative, _, ptx = run.stdout.partition("\n")
    assert cooperative == "True"
    for instruction in ("global.gpu.release.add", "global.gpu.acquire", "global.gpu.acq_rel.add", "ld.global.cg"):
        assert instruction in ptx, instruction
    wait = ptx.index("global.gpu.acquire")
    assert "ld.global.L1::evict_first" in ptx[ptx.index("global.gpu.release.add") : wait], "no prefetch before the wait"
    assert "bar.sync" in ptx[ptx.rindex("st.global", 0, ptx.index("global.gpu.release.add")) : wait]


def test_interpreter_is_refused():
    code = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "import sys; from vllm_gumiho.kernels.aot import main; sys.exit(main([]))"
    )
    run = run_python("-c", code)
    assert run.returncode == 2
    assert "TRITON_INTERPRET" in run.stderr


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_barrier_protocol(programs):
    """Every interleaving of two launches ends, with zero counters, and no stage starts before the last one is over.

    A model of ``_arrive``, ``_wait`` and ``_depart``: one step per atomic operation, three stages.
    """
    stages = 3
    # A program's steps: run and arrive at 0; wait for 0, run and arrive at 1; wait for 1, run; depart.
    script = [("arrive", 0), ("wait", 0), ("arrive", 1), ("wait", 1), ("depart", stages - 1)]

    @cache
    def explore(positions: tuple[int, ...], counters: tuple[int, ...], left: int) -> bool:
        if all(p == len(script) for p in positions):
            assert not any(counters)
            return True if left == 0 else explore((0,) * programs, counters, left - 1)
        moved = False
        for who, position in enumerate(positions):
            if position == len(script):
                continue
            action, j = script[position]
            after = list(counters)
            if action == "wait":
                if counters[j] < programs:
                    continue
                assert all(p > script.index(("arrive", j)) for p in positions)
            elif action == "arrive" or counters[j] < programs - 1:
                after[j] += 1
            else:
                after = [0] * stages
                assert all(p == len(script) for i, p in enumerate(positions) if i != who)
            moved = True
            explore((*positions[:who], position + 1, *positions[who + 1 :]), tuple(after), left)
        assert moved, "deadlock"
        return True

    assert explore((0,) * programs, (0,) * stages, 1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("hidden", [80, 576, 1536, 2048, 4096, 5120, 8192])
def test_tiles_fit(target, hidden):
    device = TARGETS[target]
    for batch in (1, 3, 16, 17, 64):
        for sizes in ((2, 2), (4, 4), (1, 2)):
            tiling = choose_tiling(batch, 5, hidden, *sizes, device)
            resident = tiling.programs // device.processors
            assert tiling.block_b == batch_tile(batch) >= batch
            assert tiling.shared_bytes(*sizes) <= device.shared_per_program
            assert resident * tiling.shared_bytes(*sizes) < device.shared_per_processor
            # 255 registers for each thread of every resident program: what a register file always holds.
            assert resident * tiling.num_warps * 32 * 255 <= 65536


def test_balance_decides_the_rows():
    assert balance(4096, 5, 64, 132) < 0.82 < 0.96 < balance(4096, 5, 32, 132)
    assert choose_tiling(1, 5, 4096, 2, 2, TARGETS["cuda:90"]).block_h == 32
    assert choose_tiling(1, 5, 8192, 2, 2, TARGETS["cuda:90"]).block_h == 64
    assert HEAD_STAGES == 6
