"""The kernels compiled for GPUs that are not there, and the tile arithmetic and barrier protocol they rest on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from vllm_gumiho.kernels.aot import TARGETS
from vllm_gumiho.kernels.device import converts_e4m3
from vllm_gumiho.kernels.lm_head_argmax.tiles import MAX_ROWS, ROW_TILES
from vllm_gumiho.kernels.lm_head_argmax.triton import choose_argmax_tiling
from vllm_gumiho.kernels.parallel_heads import HeadsPath, dispatch
from vllm_gumiho.kernels.parallel_heads.stage import program_share, taker
from vllm_gumiho.kernels.parallel_heads.tiling import (
    BATCH_TILES,
    Tiling,
    balance,
    batch_tile,
    choose_tiling,
    stage_time,
)

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.parametrize("target", TARGETS)
def test_every_shape_that_serving_launches_compiles_without_spills(target, tmp_path):
    """Each number of heads and each batch tile at the size of Llama 3 8B, and enough bytes under way in each."""
    found = tmp_path / "reports.json"
    pairs = ["--dtype", "bf16:bf16", "--heads", "1", "2", "3", "4", "5", "--batch", "1", "32"]
    run = run_python("-m", "vllm_gumiho.kernels.aot", "--target", target, *pairs, "--output", str(found))
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    reports, device = json.loads(found.read_text()), TARGETS[target]
    assert {r["kernel"] for r in reports} == {"parallel_heads", "partial_argmax", "reduce_argmax"}
    for report in reports:
        assert report["spills"] == 0
        assert 0 < report["registers"] <= 255
        assert report["shared"] <= report["shared_limit"] <= device.shared_per_program
    rows = {r["shape"] for r in reports if r["kernel"] == "partial_argmax"}
    assert rows == {f"H=4096 R={tile} bf16" for tile in ROW_TILES}
    for heads in range(1, 6):
        for batch in BATCH_TILES:
            shape = f"H=4096 B={batch} n={heads} bf16 x bf16"
            tiling = choose_tiling(batch, heads, 4096, 2, 2, device)
            compiled = [r["in_flight"] for r in reports if r["shape"].startswith(shape)]
            # One launch, or the two kinds of stage; on Hopper both, the stages with overlapping launches.
            assert len(compiled) == {"cuda:80": 1, "cuda:90": 3, "hip:gfx942": 2}[target]
            # Weights and inputs; on AMD what else a thread loads meanwhile.
            planned = tiling.bytes_in_flight(2) * (1 + batch / tiling.block_h)
            assert all(planned <= one <= 1.2 * planned for one in compiled), shape
            if device.amd:
                assert min(compiled) >= 16 << 10, "one tile of 16 KB on its way while another is multiplied"
            else:
                assert min(compiled) * tiling.programs // device.processors >= 36 << 10


@pytest.mark.parametrize(("target", "weights"), [("cuda:80", "int8"), ("cuda:90", "fp8"), ("hip:gfx942", "fp8")])
def test_8_bit_weights_compile_without_spills(target, weights, tmp_path):
    eight_bit_reports(tmp_path, target, ["--dtype", f"bf16:{weights}", "--heads", "5", "--batch", "1"])


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_every_8_bit_shape_compiles_without_spills(target, tmp_path):
    kinds = ["--dtype", "bf16:fp8", "bf16:int8", "fp16:fp8", "fp16:int8", "--batch", "1", "32"]
    eight_bit_reports(tmp_path, target, [*kinds, "--heads", "1", "2", "3", "4", "5"])


def eight_bit_reports(tmp_path, target: str, arguments: list[str]) -> None:
    """Heads, the argmax and products of 8-bit rows, with as many bytes under way as the memory needs."""
    found, device = tmp_path / "reports.json", TARGETS[target]
    run = run_python("-m", "vllm_gumiho.kernels.aot", "--target", target, *arguments, "--output", str(found))
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    reports = [report for report in json.loads(found.read_text()) if report["kernel"] != "reduce_argmax"]
    assert {r["kernel"] for r in reports} == {"parallel_heads", "partial_argmax", "rows_linear"}
    most = 512 if device.amd else 255
    for report in reports:
        assert report["spills"] == 0, report
        assert 0 < report["registers"] <= most
        assert report["shared"] <= device.shared_per_program
        if not device.amd:  # weights and inputs of two programs a processor, or of one
            assert 2 * report["in_flight"] >= 36 << 10, report
        else:
            assert report["in_flight"] >= (16 if report["kernel"] == "parallel_heads" else 8) << 10, report


@pytest.mark.parametrize("weights", ["bf16", "fp8"])
def test_weights_are_asked_for_before_a_stage_waits(weights):
    """Overlapping launches: the next is let come at once, the L2 is asked for weights, then the stage waits."""
    code = f"""
from vllm_gumiho.kernels import aot
kept, compile_ = [], aot._compile
aot._compile = lambda *a, **k: kept.append(compile_(*a, **k)) or kept[-1]
list(aot.heads_reports("cuda:90", 4096, 1, "bf16", "{weights}"))
print(kept[2].metadata.launch_pdl, kept[2].metadata.launch_cooperative_grid)
for compiled in kept:
    print("=====")
    print(compiled.asm["ptx"])
"""
    run = run_python("-c", code)
    assert run.returncode == 0, run.stderr[-3000:]
    first, one, stage_0, stage_j = run.stdout.split("=====")
    assert first.split() == ["True", "False"]
    # Code for later stages is in the first one's kernel too.
    for ptx, places in ((stage_0, 2), (stage_j, 1)):
        come, wait = ptx.index("griddepcontrol.launch_dependents"), ptx.index("griddepcontrol.wait")
        assert come < ptx.index("prefetch.global.L2") < wait
        assert "ld.global.L1::evict_first" in ptx[:wait], "the first tile of weights is on its way"
        assert "ld.global.cg" not in ptx[:wait], "an input is read before the stage that makes it is over"
        assert "st.global" not in ptx[:wait]
        # 64 KB in lines of 128 bytes, of 128 threads.
        assert ptx.count("prefetch.global.L2") == places * (64 << 10) // 128 // 128
    assert "griddepcontrol" not in one
    assert one.index("prefetch.global.L2") < one.index("global.gpu.acquire")


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
    for instruction in ("global.gpu.release.add", "global.gpu.acquire", "global.gpu.relaxed.exch", "ld.global.cg"):
        assert instruction in ptx, instruction
    before_arrival = ptx[: ptx.index("global.gpu.release.add")]
    assert before_arrival.count("global.gpu.relaxed.exch") == 4, "counters are set anew before the first arrival"
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


@pytest.mark.parametrize("left", [(0, 0, 0), (0, 1, 2), (0, 7, 0), (0, 2, 5)])
@pytest.mark.parametrize("programs", [1, 2, 3])
def test_barrier_protocol(programs, left):
    """Every interleaving of two launches ends, and no stage starts before the last one is over.

    A model of the kernel: one step per atomic operation, four stages.  left: what the counters of the barriers hold
    before the first launch; those behind the first may hold anything.
    """
    # A program's steps: run and arrive at 0; wait for 0, run and arrive at 1; ...  Program 0 sets counters anew.
    common = [("arrive", 0), ("wait", 0), ("arrive", 1), ("wait", 1), ("arrive", 2), ("wait", 2)]
    first = [("zero", 1), ("zero", 2), *common[:4], ("zero", 0), *common[4:]]
    scripts = [first, *([common] * (programs - 1))]

    @cache
    def explore(positions: tuple[int, ...], counters: tuple[int, ...], launches: int) -> bool:
        if all(p == len(script) for p, script in zip(positions, scripts, strict=True)):
            assert counters[0] == 0
            return True if launches == 0 else explore((0,) * programs, counters, launches - 1)
        moved = False
        for who, position in enumerate(positions):
            if position == len(scripts[who]):
                continue
            action, j = scripts[who][position]
            after = list(counters)
            if action == "wait":
                if counters[j] < programs:
                    continue
                passed = [p > script.index(("arrive", j)) for p, script in zip(positions, scripts, strict=True)]
                assert all(passed), "a stage starts before the last one is over"
            elif action == "arrive":
                after[j] += 1
            else:
                after[j] = 0
            moved = True
            explore((*positions[:who], position + 1, *positions[who + 1 :]), tuple(after), launches)
        assert moved, "deadlock"
        return True

    assert explore((0,) * programs, left, 1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("hidden", [80, 576, 1536, 2048, 4096, 5120, 8192])
def test_tiles_fit(target, hidden):
    device = TARGETS[target]
    for batch in (1, 3, 16, 17, 32):
        for heads in range(1, 6):
            for sizes in ((2, 2), (4, 4), (1, 2)):
                tiling = choose_tiling(batch, heads, hidden, *sizes, device)
                assert tiling.block_b == batch_tile(batch) >= batch
                assert tiling == choose_tiling(tiling.block_b, heads, hidden, *sizes, device)
                assert tiling.shared_bytes(*sizes) <= device.shared_per_program
                if device.amd:  # a program a tile, and no barrier that asks for all of them at once
                    assert tiling.programs == heads * -(-hidden // tiling.block_h)
                    continue
                resident = tiling.programs // device.processors
                assert resident * tiling.shared_bytes(*sizes) < device.shared_per_processor
                # 255 registers for each thread of every resident program: what a register file always holds.
                assert resident * tiling.num_warps * 32 * 255 <= 65536


def test_balance_is_that_of_the_programs():
    """Of an H100's 264: at five heads 112 have a third tile of 32 rows, at one head half have none."""
    assert balance(4096, 5, 32, 264) == pytest.approx(640 / (3 * 264))
    assert balance(4096, 1, 32, 264) == pytest.approx(128 / 264)
    assert balance(4096, 5, 32, 132) > 0.96 > 0.82 > balance(4096, 5, 64, 132)


@settings(max_examples=300, deadline=None, database=None)
@given(st.integers(1, 600), st.integers(1, 300), st.integers(1, 70))
def test_no_program_has_more_than_a_k_block_more(tiles, programs, k_blocks):
    """Of the last round's tiles: every block is dealt out once, to the program that `taker` says."""
    shares = [program_share.fn(program, programs, tiles, k_blocks, True) for program in range(programs)]
    rest = tiles % programs * k_blocks
    assert [block for _, begin, end in shares for block in range(begin, end)] == list(range(rest))
    lengths = [end - begin for _, begin, end in shares]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= k_blocks, "a run has parts of two tiles at most, which have two slots"
    assert {whole for whole, _, _ in shares} == {tiles // programs * k_blocks}
    for program, (_, begin, end) in enumerate(shares):
        assert all(taker.fn(block, programs, rest) == program for block in (begin, end - 1) if begin < end)


def test_a_round_is_spread_where_it_pays():
    """Of an H100, by the model of a stage's time: 320 tiles of 8-bit weights leave 56 for 264 programs."""
    h100 = TARGETS["cuda:90"]
    for weight_bytes, hidden, heads, pays in ((1, 4096, 5, True), (1, 4096, 1, True), (2, 4096, 5, False)):
        tiling = choose_tiling(1, heads, hidden, weight_bytes, 2, h100)
        assert tiling.spread is pays
        other = replace(tiling, spread=not pays)
        times = [stage_time(hidden, heads, one, weight_bytes, 2, h100) for one in (tiling, other)]
        assert times[0] < times[1] * (0.98 if pays else 1.02)
    assert not any(choose_tiling(1, n, 4096, 1, 2, TARGETS["hip:gfx942"]).spread for n in range(1, 6))


def test_a_stages_time_counts_the_last_round_and_the_l2():
    h100 = TARGETS["cuda:90"]
    two, one = Tiling(32, 16, 128, 5, 4, 264), Tiling(64, 32, 128, 5, 4, 132)
    # 528 tiles at the full rate; 112 with 3.5 MB on their way of the 4.6 that 132 x 36 KB are.
    assert stage_time(4096, 5, two, 2, 2, h100) == pytest.approx((528 + 112 / (112 * 32 / (132 * 36))) / 640)
    # A batch of 64 on 32 rows: every weight's inputs are two more bytes through the L2.
    assert Tiling(32, 64, 128, 4, 4, 264).traffic(2, 2) == 3
    assert stage_time(4096, 5, Tiling(32, 64, 128, 4, 4, 264), 2, 2, h100) == pytest.approx(3 / 1.8)
    assert stage_time(4096, 5, one, 2, 2, h100) < 1.1


def test_traffic_and_the_last_round_decide_the_tiles():
    h100 = TARGETS["cuda:90"]
    assert choose_tiling(1, 5, 4096, 2, 2, h100).block_h == 32
    assert choose_tiling(17, 5, 4096, 2, 2, h100).block_h == 64, "32 rows would read the inputs of 32 requests twice"
    assert choose_tiling(1, 5, 8192, 2, 2, h100).block_h == 64
    for hidden in (4096, 8192):
        for batch in BATCH_TILES:
            tiling = choose_tiling(batch, 5, hidden, 2, 2, h100)
            assert tiling.traffic(2, 2) / 1.8 <= 1.1, "the L2 takes longer than the memory"


@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
def test_the_argmax_passes_little_through_the_l2(rows):
    """An H100's L2 at 5.5 TB/s takes at most a tenth more than its memory at 3.05 TB/s, which 65 rows would not hold.

    Every block of rows reads the weights once, and every tile of tokens the rows.
    """

    def over_memory(rows: int, block_r: int, block_v: int) -> float:
        return (-(-rows // block_r) + rows / block_v) / 5.5 * 3.05

    tiling = choose_argmax_tiling(rows, 2)
    assert over_memory(rows, tiling.block_r, tiling.block_v) <= 1.1
    assert over_memory(MAX_ROWS + 1, tiling.block_r, tiling.block_v) > 1.1


@pytest.mark.parametrize(
    ("capability", "native"),
    [((8, 0), False), ((8, 9), True), ((9, 0), True), ("gfx942:sramecc+:xnack-", False), ("gfx950", True)],
)
def test_fp8_is_converted_where_the_device_has_that_format(capability, native):
    assert converts_e4m3(capability) is native


class FakeDriver:
    """libcuda that answers by attribute."""

    def __init__(self, **attributes: int):
        self.attributes = {95: attributes.get("cooperative", 1), 133: attributes.get("mps", 0)}

    def cuDeviceGet(self, device, index):  # noqa: N802 - NVIDIA's name
        return 0

    def cuDeviceGetAttribute(self, value, number, device):  # noqa: N802 - NVIDIA's name
        value._obj.value = self.attributes[number]
        return 0


@pytest.mark.parametrize(
    ("driver", "path", "reason"),
    [
        (FakeDriver(), HeadsPath.FUSED, "fits one launch"),
        (FakeDriver(mps=1), HeadsPath.STAGES, "MPS shares the GPU among processes"),
        (FakeDriver(cooperative=0), HeadsPath.STAGES, "no cooperative launch"),
        (SimpleNamespace(), HeadsPath.STAGES, "cannot be asked"),
    ],
)
def test_one_launch_only_where_all_programs_are_sure_to_run(monkeypatch, driver, path, reason):
    monkeypatch.setattr(dispatch.ctypes, "CDLL", lambda name: driver)
    dispatch.single_launch_problem.cache_clear()
    on_gpu = SimpleNamespace(shape=(1, 16), dtype=torch.bfloat16, device=torch.device("cuda", 0))
    weights = SimpleNamespace(weight=torch.empty(1, 5, 16, 16, dtype=torch.bfloat16))
    try:
        found, why = dispatch.choose_path(on_gpu, weights)
    finally:
        dispatch.single_launch_problem.cache_clear()
    assert found is path
    assert reason in why
