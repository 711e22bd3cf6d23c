"""Compile the Triton kernels without a GPU and report what they take: ``python -m vllm_gumiho.kernels.aot``."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_gumiho.kernels.lm_head_argmax.tiles import ROW_TILES
from vllm_gumiho.kernels.parallel_heads.tiling import BATCH_TILES, Device, choose_tiling

TARGETS = {
    "cuda:80": Device(108, 164 << 10, 163 << 10),
    "cuda:90": Device(132, 228 << 10, 227 << 10),
    "hip:gfx942": Device(304, 64 << 10, 64 << 10, amd=True, packed=False),
}
_EIGHT_BIT = ("fp8", "int8")
_ELEMENT_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1, "int8": 1}


@dataclass(frozen=True)
class Report:
    """One compiled kernel.  spills: bytes of stack on NVIDIA, vector registers spilled on AMD."""

    kernel: str
    target: str
    shape: str
    registers: int
    spills: int
    shared: int  # bytes
    shared_limit: int  # bytes: what the tile choice counted with
    in_flight: int | None = None  # bytes of a program that are under way at once, by its instructions


def _stored(weights: str, device: Device) -> str:
    """Triton's type of weights in memory."""
    return {"fp8": "fp8e4b8" if device.amd else "u8", "int8": "i8"}.get(weights, weights)


def _gpu_target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    backend, arch = name.split(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


def _compile(
    fn: Any,
    target: str,
    pointers: dict[str, str],
    integers: str,
    constants: dict[str, Any],
    num_warps: int,
    cooperative: bool = False,
    dependent: bool = False,
) -> Any:
    """pointers: element type by argument; integers: names of the other run-time arguments."""
    import triton
    from triton.compiler import ASTSource

    signature = dict.fromkeys(fn.arg_names, "constexpr")
    signature |= {name: f"*{kind}" for name, kind in pointers.items()}
    signature |= dict.fromkeys(integers.split(), "i32")
    # As at a launch: torch's allocations and the strides of these shapes are multiples of 16.
    aligned = [name for name in fn.arg_names if name in pointers or name.endswith("_stride")]
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn, signature, constants, attributes)
    options = {"num_warps": num_warps, "launch_cooperative_grid": cooperative}
    options |= {"launch_pdl": True} if dependent else {}
    return triton.compile(source, target=_gpu_target(target), options=options)


def _registers_and_spills(compiled: Any) -> tuple[int, int]:
    if "cubin" in compiled.asm:
        from triton import knobs

        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        return found["REG"], found["STACK"] + found["LOCAL"]
    found = {key: int(value) for key, value in re.findall(r"\.(vgpr_\w*count): +(\d+)", compiled.asm["amdgcn"])}
    return found["vgpr_count"], found["vgpr_spill_count"]


def _bytes_in_flight(compiled: Any) -> int:
    """The most bytes of a program's loads that are under way at once, read off the instructions in their order.

    NVIDIA: copies to shared memory, by the groups that a wait leaves open.  AMD: loads to registers, until a wait for
    all of them.
    """
    nvidia = "ptx" in compiled.asm
    threads = compiled.metadata.num_warps * (32 if nvidia else 64)
    load = (
        r"cp\.async\.c[ag]\.shared\.global\S* \[[^]]*\], \[[^]]*\], 0x(?P<bytes>\w+)"
        if nvidia
        else r"(?:global|buffer)_load_dword(?:x(?P<words>\d))? "
    )
    groups, most = [0], 0
    for line in compiled.asm["ptx" if nvidia else "amdgcn"].splitlines():
        if found := re.search(load, line):
            groups[-1] += threads * (int(found["bytes"], 16) if nvidia else 4 * int(found["words"] or 1))
            most = max(most, sum(groups))
        elif "cp.async.commit_group" in line:
            groups.append(0)
        elif wait := re.search(r"cp\.async\.wait_group\s+(?:0x)?(\d+)", line):
            groups = groups[max(0, len(groups) - 1 - int(wait[1])) :]
        elif "vmcnt(0)" in line:
            groups = [0]
    return most


def heads_reports(target: str, hidden: int, batch: int, dtype: str, weights: str, heads: int = 5) -> Iterator[Report]:
    """The parallel heads in the form that the target uses: one launch with barriers, or the two kinds of stage."""
    from vllm_gumiho.kernels.parallel_heads.triton import BYTES_AHEAD, MAX_POLLS, parallel_heads_kernel

    device, scaled = TARGETS[target], weights in _EIGHT_BIT
    sizes = _ELEMENT_SIZE[weights], _ELEMENT_SIZE[dtype]
    tiling = choose_tiling(batch, heads, hidden, *sizes, device)
    stored = _stored(weights, device)
    pointers = dict.fromkeys(("rest_ptr", "last_ptr", "first_b_ptr", "b_ptr", "z_ptr"), dtype)
    pointers |= {"first_w_ptr": stored, "w_ptr": stored, "parts_ptr": "fp32"}
    pointers |= dict.fromkeys(("counters_ptr", "tickets_ptr"), "i32")
    pointers |= dict.fromkeys(("first_s_ptr", "s_ptr"), "fp32" if scaled else dtype)
    several = {", stage 0": (True, False, False), ", stage j": (False, False, False)}
    forms = {"": (True, True, False)} if target.startswith("cuda") else several
    if target == "cuda:90":
        forms |= {f"{name} ahead": (first, False, True) for name, (first, _, _) in several.items()}
    for name, (first, barrier, dependent) in forms.items():
        constants = {
            "FIRST": first,
            "BARRIER": barrier,
            "SCALED": scaled,
            "PACKED": tiling.packed,
            "SPREAD": tiling.spread,
            "HEADS": heads,
            "H": hidden,
            "PARTS": 2,
            "BLOCK_H": tiling.block_h,
            "BLOCK_B": tiling.block_b,
            "BLOCK_K": tiling.block_k,
            "NUM_STAGES": tiling.num_stages,
            "MAX_POLLS": MAX_POLLS,
            "AHEAD": BYTES_AHEAD if device.packed else 0,
            "DEPENDENT": dependent,
        }
        integers = "rest_stride last_stride B begin end"
        compiled = _compile(
            parallel_heads_kernel, target, pointers, integers, constants, tiling.num_warps, barrier, dependent
        )
        shape = f"H={hidden} B={tiling.block_b} n={heads} {dtype} x {weights}{name}"
        tile = f"{tiling.block_h}x{tiling.block_k} depth {tiling.num_stages}{' spread' if tiling.spread else ''}"
        registers, spills = _registers_and_spills(compiled)
        limit = min(tiling.shared_bytes(*sizes), device.shared_per_program)
        shared, in_flight = compiled.metadata.shared, _bytes_in_flight(compiled)
        yield Report("parallel_heads", target, f"{shape}, {tile}", registers, spills, shared, limit, in_flight)


def argmax_reports(target: str, hidden: int, rows: int, dtype: str, weights: str) -> Iterator[Report]:
    """Both launches of the LM head's argmax."""
    from vllm_gumiho.kernels.lm_head_argmax.triton import (
        choose_argmax_tiling,
        partial_argmax_kernel,
        reduce_argmax_kernel,
    )

    device = TARGETS[target]
    small = device.shared_per_processor < 128 << 10
    tiling = choose_argmax_tiling(rows, _ELEMENT_SIZE[weights], small, device.packed)
    scaled = weights in _EIGHT_BIT
    constants = {
        "SCALED": scaled,
        "PACKED": device.packed,
        "H": hidden,
        "BLOCK_V": tiling.block_v,
        "BLOCK_R": tiling.block_r,
        "BLOCK_K": tiling.block_k,
        "NUM_STAGES": tiling.num_stages,
    }
    pointers = {"rows_ptr": dtype, "weight_ptr": _stored(weights, device), "s_ptr": "fp32", "top_ptr": "fp32"}
    pointers |= {"index_ptr": "i32"}
    integers = "R V tiles row_stride weight_stride"
    compiled = _compile(partial_argmax_kernel, target, pointers, integers, constants, tiling.num_warps)
    limit = device.shared_per_program
    shape = f"H={hidden} R={tiling.block_r} {dtype}" + (f" x {weights}" if scaled else "")
    shared, in_flight = compiled.metadata.shared, _bytes_in_flight(compiled)
    yield Report("partial_argmax", target, shape, *_registers_and_spills(compiled), shared, limit, in_flight)
    pointers = {"top_ptr": "fp32", "index_ptr": "i32", "ids_ptr": "i64", "logits_ptr": "fp32"}
    compiled = _compile(reduce_argmax_kernel, target, pointers, "tiles index_offset", {"BLOCK_T": 1024}, 4)
    yield Report("reduce_argmax", target, "any", *_registers_and_spills(compiled), compiled.metadata.shared, limit)


def linear_reports(target: str, hidden: int, batch: int, dtype: str, weights: str) -> Iterator[Report]:
    """The product with 8-bit rows at the size of ``fc``, and of an LM head."""
    from vllm_gumiho.kernels.eight_bit.triton import choose_linear_tiling, rows_linear_kernel

    device = TARGETS[target]
    for rows, columns in ((hidden, 2 * hidden), (128256, hidden)):
        small = device.shared_per_processor < 128 << 10
        tiling = choose_linear_tiling(
            batch, rows, columns, device.processors, device.amd, device.packed, small_shared=small
        )
        constants = {
            "K": columns,
            "SPLITS": tiling.splits,
            "BIAS": True,
            "PACKED": tiling.packed,
            "BLOCK_N": tiling.block_n,
            "BLOCK_B": tiling.block_b,
            "BLOCK_K": tiling.block_k,
            "NUM_STAGES": tiling.num_stages,
        }
        pointers = {"x_ptr": dtype, "w_ptr": _stored(weights, device), "s_ptr": "fp32", "bias_ptr": dtype}
        pointers |= {"part_ptr": "fp32", "out_ptr": dtype}
        compiled = _compile(rows_linear_kernel, target, pointers, "B N x_stride", constants, tiling.num_warps)
        shape = f"{rows}x{columns} B={tiling.block_b} splits={tiling.splits} {dtype} x {weights}"
        shared, in_flight = compiled.metadata.shared, _bytes_in_flight(compiled)
        limit = device.shared_per_program
        yield Report("rows_linear", target, shape, *_registers_and_spills(compiled), shared, limit, in_flight)


def reports(
    targets: list[str], hidden_sizes: list[int], batches: list[int], pairs: list[str], heads: list[int]
) -> Iterator[Report]:
    """Every kernel at every shape; pairs: ``dtype:weights``, as ``bf16:fp8``."""
    for target in targets:
        for pair in pairs:
            dtype, weights = pair.split(":")
            for hidden in hidden_sizes:
                for batch in batches:
                    for count in heads:
                        yield from heads_reports(target, hidden, batch, dtype, weights, count)
                for rows in ROW_TILES:
                    yield from argmax_reports(target, hidden, rows, dtype, weights)
                if weights in _EIGHT_BIT:
                    for batch in (*BATCH_TILES, 64):
                        yield from linear_reports(target, hidden, batch, dtype, weights)


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit status 1 where a kernel spills or takes more shared memory than was planned."""
    parser = argparse.ArgumentParser(prog="python -m vllm_gumiho.kernels.aot", description=__doc__)
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--hidden", nargs="+", type=int, default=[4096])
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCH_TILES))
    parser.add_argument("--heads", nargs="+", type=int, default=[5])
    parser.add_argument("--dtype", nargs="+", default=["bf16:bf16", "fp16:fp16", "fp32:fp32", "bf16:fp8", "bf16:int8"])
    parser.add_argument("--output", "--json", type=Path, help="also write the reports to this file")
    args = parser.parse_args(argv)

    from triton import knobs

    if knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it", file=sys.stderr)
        return 2
    found: list[Report] = []
    for report in reports(args.target, args.hidden, args.batch, args.dtype, args.heads):
        if report in found:
            continue
        found.append(report)
        print(
            f"{report.target:<11} {report.kernel:<15} {report.registers:>4} registers {report.spills:>4} spilled "
            f"{report.shared:>7} B shared {report.in_flight or 0:>7} B under way  {report.shape}",
            flush=True,
        )
    if args.output:
        args.output.write_text(json.dumps([asdict(report) for report in found], indent=1) + "\n")
    bad = [report for report in found if report.spills or report.shared > report.shared_limit]
    for report in bad:
        print(f"too large: {report}", file=sys.stderr)
    return bool(bad)
