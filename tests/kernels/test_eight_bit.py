"""8-bit rows: how they are made, decoded and multiplied, against plain torch; the kernels under Triton's interpreter.

Triton decides at its import whether kernels are interpreted: this module runs itself in a new process for those.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from interpreted import INTERPRETED, run_interpreted
from torch import Tensor

from vllm_gumiho.checkpoint.tensors import SCALE, quantise
from vllm_gumiho.kernels import eight_bit
from vllm_gumiho.kernels import lm_head_argmax as argmax
from vllm_gumiho.kernels.eight_bit import EIGHT_BIT, EightBitRows, as_fnuz, dequantise_rows, quantise_rows, rows_linear
from vllm_gumiho.kernels.eight_bit import decode as ptx
from vllm_gumiho.kernels.eight_bit.triton import choose_linear_tiling
from vllm_gumiho.kernels.parallel_heads import SPACING

CODES = torch.arange(256, dtype=torch.uint8)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class TestInNewProcess:
    __test__ = not INTERPRETED

    def test_under_interpreter(self, pytestconfig):
        run_interpreted(__file__, pytestconfig)


class TestRows:
    __test__ = not INTERPRETED

    @pytest.mark.parametrize("kind", EIGHT_BIT)
    def test_rows_are_within_half_a_step(self, kind):
        weight = torch.randn(3, 5, 40) * torch.logspace(-6, 2, 5)[:, None]
        weight[1, 2] = 0.0
        rows = quantise_rows(weight, EIGHT_BIT[kind])
        wide = dequantise_rows(rows)
        assert (wide[1, 2] == 0).all()
        largest = weight.abs().amax(-1, keepdim=True)
        # int8: half of a 127th.  e4m3: three bits behind the first one; below 2^-6 of 448 its steps are even.
        step = largest / 254 if kind == "int8" else torch.maximum(weight.abs() / 16, largest * 2.0**-10 / 448)
        assert ((wide - weight).abs() <= step * 1.001).all()
        assert torch.allclose(wide.abs().amax(-1, keepdim=True), largest, rtol=1e-6)

    def test_int8_rows_are_those_of_checkpoints(self):
        weight = torch.randn(7, 33)
        written = dict(quantise("w", weight))
        rows = quantise_rows(weight, torch.int8)
        assert torch.equal(rows.weight, written["w"])
        assert torch.equal(rows.scale, written["w" + SCALE])

    def test_fnuz_rows_are_the_same_numbers(self):
        finite = CODES[~CODES.view(torch.float8_e4m3fn).float().isnan()]
        rows = EightBitRows(finite.view(torch.float8_e4m3fn)[None], torch.tensor([0.375]))
        assert (finite == 128).any(), "minus zero, which is no number in fnuz"
        assert torch.equal(dequantise_rows(as_fnuz(rows)), dequantise_rows(rows))

    def test_wide_products_follow_the_definition(self):
        rows, x, bias = quantise_rows(torch.randn(9, 20), torch.int8), torch.randn(70, 20), torch.randn(9)
        assert torch.allclose(rows_linear(x, rows, bias), x @ dequantise_rows(rows).T + bias, atol=1e-5)
        assert eight_bit.launches["widened"]


def run_ptx(source: str, codes: int) -> list[int]:
    """What the instructions of `decode` make of four codes in a register: the two output registers."""

    def bf16(bits: int) -> float:
        return struct.unpack("f", struct.pack("I", bits << 16))[0]

    def fp16(bits: int) -> float:
        return struct.unpack("e", struct.pack("H", bits))[0]

    def to_bf16(value: float) -> int:
        (bits,) = struct.unpack("I", struct.pack("f", value))
        assert bits & 0xFFFF == 0, "not exact in bfloat16"
        return bits >> 16

    def to_fp16(value: float) -> int:
        (bits,) = struct.unpack("H", struct.pack("e", value))
        assert fp16(bits) == value, "not exact in float16"
        return bits

    def lanes(read: Callable, write: Callable, compute: Callable) -> Callable:
        def both(*registers: int) -> int:
            low, high = (write(compute(*(read(r >> at & 0xFFFF) for r in registers))) for at in (0, 16))
            return low | high << 16

        return both

    def prmt(a: int, b: int, select: int) -> int:
        both = a | b << 32
        return sum((both >> 8 * (select >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))

    def lop3(a: int, b: int, c: int, table: int) -> int:
        return sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))

    def sub_f32(a: int, b: int) -> int:
        x, y = (struct.unpack("f", struct.pack("I", r))[0] for r in (a, b))
        return struct.unpack("I", struct.pack("f", x - y))[0]

    fused = lambda a, b, c: a * b + c if a * b else a * b  # noqa: E731 - minus zero added keeps a zero's sign
    operations: dict[str, Callable] = {
        "mov.b32": lambda a: a, "prmt.b32": prmt, "lop3.b32": lop3, "xor.b32": lambda a, b: a ^ b,
        "and.b32": lambda a, b: a & b, "shr.u32": lambda a, b: a >> b, "sub.f32": sub_f32,
        "sub.f16x2": lanes(fp16, to_fp16, lambda a, b: a - b), "fma.rn.f16x2": lanes(fp16, to_fp16, fused),
        "fma.rn.bf16x2": lanes(bf16, to_bf16, fused),
    }  # fmt: skip
    registers = {"$2": codes}

    def value(word: str) -> int:
        if word in registers:
            return registers[word]
        return int(word.removeprefix("0f"), 16) if word.startswith("0f") else int(word, 0)

    for line in source.strip().strip("{}").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name and name != ".reg":
            target, *inputs = (word.strip() for word in operands.split(","))
            registers[target] = operations[name](*map(value, inputs)) & 0xFFFFFFFF
    return [registers["$0"], registers["$1"]]


@pytest.mark.parametrize(("source", "stored", "wide"), [
    (ptx.E4M3_TO_BF16, torch.float8_e4m3fn, torch.bfloat16), (ptx.E4M3_TO_FP16, torch.float8_e4m3fn, torch.float16),
    (ptx.INT8_TO_BF16, torch.int8, torch.bfloat16), (ptx.INT8_TO_FP16, torch.int8, torch.float16),
])  # fmt: skip
def test_the_packed_decode_is_exact_for_every_code_in_every_place(source, stored, wide):
    """The PTX itself, carried out here, against torch's conversion: every bit, signs of zeros too."""
    exact = CODES.view(stored).to(wide)
    for code in range(256):
        if exact[code].isnan():
            continue
        # In each of the four places, beside others.
        four = [code, (code + 1) % 127, 255 - code if not exact[255 - code].isnan() else 3, code ^ 0x11]
        four = [c if not exact[c].isnan() else 1 for c in four]
        for turn in range(4):
            placed = four[turn:] + four[:turn]
            found = run_ptx(source, sum(c << 8 * i for i, c in enumerate(placed)))
            halves = torch.tensor([r >> at & 0xFFFF for r in found for at in (0, 16)], dtype=torch.int32)
            wanted = exact[placed].view(torch.int16).int() & 0xFFFF
            assert torch.equal(halves, wanted), f"codes {placed}: {halves.tolist()}, not {wanted.tolist()}"


@pytest.mark.parametrize(("rows", "columns"), [(4096, 8192), (6144, 4096), (128_256, 4096), (576, 1152), (64, 48)])
@pytest.mark.parametrize("batch", [1, 17, 64])
def test_the_parts_of_k_give_every_processor_work(rows, columns, batch):
    tiling = choose_linear_tiling(batch, rows, columns, processors=132)
    blocks = -(-columns // tiling.block_k)
    each = -(-blocks // tiling.splits)
    assert tiling.block_b >= batch
    assert (tiling.splits - 1) * each < blocks, "no part is empty"
    programs = -(-rows // tiling.block_n) * tiling.splits
    assert programs >= 2 * 132 or each < 8, "the parts could be more"


def assert_product(found: Tensor, x: Tensor, rows: EightBitRows, bias: Tensor | None) -> None:
    """One rounding to x's dtype; the interpreter truncates."""
    exact = x.float() @ dequantise_rows(rows).T + (0 if bias is None else bias.float())
    assert found.dtype == x.dtype
    assert found.shape == exact.shape
    assert (found.float() - exact).abs().max() <= 2 * SPACING[x.dtype] * exact.abs().max()


class TestKernels:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("kind", EIGHT_BIT)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("batch", "count", "columns", "bias"), [
        (1, 70, 80, True), (17, 64, 1300, False), (64, 3, 16, True),
    ])  # fmt: skip
    def test_products_equal_the_reference(self, poisoned, kind, dtype, batch, count, columns, bias):
        rows = quantise_rows(torch.randn(count, columns), EIGHT_BIT[kind])
        x = torch.randn(batch, 2 * columns).to(dtype)[:, :columns]
        added = torch.randn(count).to(dtype) if bias else None
        before = eight_bit.launches["triton"]
        assert_product(rows_linear(x, rows, added), x, rows, added)
        assert eight_bit.launches["triton"] == before + 1

    @pytest.mark.parametrize(("batch", "by"), [(65, "triton"), (130, "triton"), (16 * 64, "triton"), (1025, "widened")])
    def test_more_rows_than_a_launch_takes_go_in_parts(self, poisoned, batch, by):
        """Each reads a byte a code, where widening moves 21; above 16 parts it is done all the same."""
        rows, x, bias = quantise_rows(torch.randn(20, 32), torch.int8), torch.randn(batch, 32), torch.randn(20)
        before = eight_bit.launches.copy()
        assert_product(rows_linear(x, rows, bias), x, rows, bias)
        assert eight_bit.launches - before == {by: 1}

    def test_parts_of_k_are_summed(self, poisoned):
        rows, x = quantise_rows(torch.randn(20, 2048), torch.int8), torch.randn(3, 2048)
        assert choose_linear_tiling(3, 20, 2048, processors=2, packed=False).splits > 1
        assert_product(rows_linear(x, rows), x, rows, None)

    def test_every_e4m3_code_is_decoded(self, poisoned):
        """Through the kernel, against torch's own conversion."""
        values = torch.where(CODES.view(torch.float8_e4m3fn).float().isnan(), 0, CODES).view(16, 16)
        rows = EightBitRows(values.view(torch.float8_e4m3fn), torch.ones(16))
        assert torch.equal(rows_linear(torch.eye(16), rows).T, dequantise_rows(rows))

    @settings(max_examples=6, deadline=None, database=None)
    @given(
        st.integers(1, 64), st.integers(1, 130), st.integers(1, 300), st.sampled_from(DTYPES),
        st.sampled_from(sorted(EIGHT_BIT)), st.booleans(),
    )  # fmt: skip
    def test_any_product(self, batch, count, columns, dtype, kind, bias):
        rows = quantise_rows(torch.randn(count, columns), EIGHT_BIT[kind])
        x, added = torch.randn(batch, columns).to(dtype), torch.randn(count).to(dtype) if bias else None
        assert_product(rows_linear(x, rows, added), x, rows, added)

    @pytest.mark.parametrize("kind", EIGHT_BIT)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_argmax_is_that_of_the_rows(self, poisoned, kind, dtype):
        """Rows of very unequal scales, so that an argmax over codes would be another; padding behind."""
        rows = quantise_rows(torch.randn(150, 48) * torch.logspace(-2, 0, 150)[:, None], EIGHT_BIT[kind])
        x = torch.randn(20, 48).to(dtype)
        found = argmax.lm_head_argmax(x, rows.weight, 140, 5, scale=rows.scale)
        logits = x.float() @ dequantise_rows(rows)[:140].T
        best = logits.amax(-1)
        assert ((found.logits - best).abs() <= 1e-4).all()
        assert ((best - logits.gather(1, found.ids[:, None] - 5)[:, 0]) <= 1e-4).all()
        codes = (x.float() @ rows.weight[:140].float().T).argmax(-1)
        assert (codes != found.ids - 5).any()


@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_tiles_of_float32_fit_into_100_kib():
    """Of an L4, an A10 or a consumer's card, where more tiles at once would be refused at the launch."""
    code = """
from vllm_gumiho.kernels import aot
aot.TARGETS["cuda:89"] = aot.Device(58, 100 << 10, 99 << 10)
print(next(aot.linear_reports("cuda:89", 1024, 64, "fp32", "int8")).shared)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert 0 < int(done.stdout) <= 99 << 10


@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_each_weight_is_converted_once(tmp_path):
    """Counted in the compiled code, of each place where a tile is multiplied; none by the slow conversion."""
    code = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
from triton import knobs
from vllm_gumiho.kernels import aot
kept, compile_ = [], aot._compile
aot._compile = lambda *a, **k: kept.append(compile_(*a, **k)) or kept[-1]
found = {}
for target in ("cuda:90", "hip:gfx942"):
    for weights in ("fp8", "int8"):
        kept.clear()
        next(aot.heads_reports(target, 4096, 1, "bf16", weights))
        compiled = kept[-1]
        text = compiled.asm.get("amdgcn")
        if text is None:
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder, "kernel.cubin")
                cubin.write_bytes(compiled.asm["cubin"])
                text = subprocess.run([knobs.nvidia.nvdisasm.path, str(cubin)], capture_output=True, text=True).stdout
        # int8 is decoded by taking 2^23 + 128 from a float32; other additions are of sums.
        counted = r"F2FP|F2F|HMUL2|HFMA2|FADD [^;]*-8388736|HGMMA|v_cvt_pk_f32_fp8|v_cvt_f32_i32|v_mfma_f32_16x16x16"
        names = re.findall(rf"\\b({counted})", text)
        names = [name.split()[0] for name in names]
        found[target + " " + weights] = {name: names.count(name) for name in set(names)}
print(json.dumps(found))
"""
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    # A tile of 64 x 128 is 64 codes for each of 128 threads, multiplied in four places of the kernel.
    places, codes = 4, 64
    fp8, int8 = found["cuda:90 fp8"], found["cuda:90 int8"]
    assert fp8["HGMMA"] == int8["HGMMA"] == places * 128 // 16
    assert fp8["HMUL2"] + fp8.get("HFMA2", 0) == places * codes // 2
    assert int8["FADD"] == places * codes
    assert not fp8.get("F2F")
    assert not int8.get("F2F")
    # A tile of 64 x 256 for 256 threads, 64 codes each; a matrix instruction takes 16 columns of them.
    for weights, instruction, at_once in (("fp8", "v_cvt_pk_f32_fp8", 2), ("int8", "v_cvt_f32_i32", 1)):
        amd = found[f"hip:gfx942 {weights}"]
        places = amd["v_mfma_f32_16x16x16"] // (256 // 16)
        assert amd[instruction] * at_once == places * codes
