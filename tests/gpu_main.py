"""Everything that needs a GPU, in one command: ``python tests/gpu_main.py --out out/gpu`` (``make gpu``).

    kernels   their tests on the device (tests/kernels/test_kernel_gpu.py)
    engine    a tiny target in both model runners with CUDA graphs, kernels off and on: log lines, texts, launches
    bench     python -m vllm_gumiho.kernels.bench --output OUT/bench.json
    speed     only with --target (and --checkpoint): tokens per second with the kernels off and on

Needs vLLM for CUDA in the interpreter that runs it, nothing of this project installed.  Each part writes its log into
OUT; ``OUT/report.json`` has the results; the exit status is 1 where a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PARTS = ("kernels", "engine", "bench", "speed")
SWITCHES = ("0", "auto")


def environment(**more: str) -> dict[str, str]:
    known = (str(TESTS.parent), str(TESTS / "support"), os.environ.get("PYTHONPATH"))
    path = os.pathsep.join(p for p in known if p)
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "GUMIHO_TESTS_ON_GPU": "1", **more}


def run(out: Path, name: str, *command: str, **more: str) -> dict:
    """Run a command with its output in ``OUT/name.log``."""
    started, log = time.monotonic(), out / f"{name}.log"
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, *command], env=environment(**more), stdout=file, stderr=subprocess.STDOUT, check=False
        )
    return {"status": done.returncode, "seconds": round(time.monotonic() - started, 1), "log": str(log)}


def run_cases(out: Path, name: str, runner: str, switch: str, cases: dict[str, dict]) -> dict:
    """Engine cases in a process of their own, with the switch set; their results and Gumiho's lines of the log."""
    from engines import run_engines

    folder, started = out / name, time.monotonic()
    folder.mkdir(exist_ok=True)
    asked = {key: value | {"import_first": True} for key, value in cases.items()}
    results = run_engines(folder, runner, asked, environment(VLLM_GUMIHO_KERNELS=switch))
    text = next(iter(results.values())).get("log", "")
    (out / f"{name}.log").write_text(text)
    lines = [line for line in text.splitlines() if "Gumiho drafts with" in line]
    return {"seconds": round(time.monotonic() - started, 1), "lines": lines, "cases": results}


def engine(out: Path) -> dict:
    """Tiny target: in float32 the text must be the target's own; bfloat16 is reported, as ties may fall otherwise."""
    import tiny
    from engines import case

    target = tiny.write_target(out / "tiny-target")
    checkpoint = tiny.write_released(out / "tiny-checkpoint", tiny.drafter_tensors())
    settings = {"enforce_eager": False, "gpu_memory_utilization": 0.2, "max_num_seqs": 8}
    cases = {}
    for dtype, more in (("float32", {"attention_backend": "TRITON_ATTN"}), ("bfloat16", {})):
        off = settings | {"dtype": dtype} | more
        cases[f"off {dtype}"] = case(target, **off)
        cases[f"gumiho {dtype}"] = case(target, {"method": "gumiho", "model": str(checkpoint)}, **off)
    report: dict = {"ok": True}
    for runner in ("v1", "v2"):
        for switch in SWITCHES:
            found = run_cases(out, f"engine-{runner}-{switch}", runner, switch, cases)
            results = found.pop("cases")
            for dtype in ("float32", "bfloat16"):
                ours, own = results.get(f"gumiho {dtype}", {}), results.get(f"off {dtype}", {})
                found[dtype] = {"equal": "tokens" in ours and ours["tokens"] == own.get("tokens")}
                found[dtype] |= {key: ours.get(key) for key in ("launches", "drafts", "drafted", "accepted", "error")}
            report["ok"] &= found["float32"]["equal"]
            report[f"{runner} kernels={switch}"] = found
    return report


def speed(out: Path, target: str, checkpoint: str | None) -> dict:
    """Tokens per second of one request and of eight, greedy, 256 tokens each."""
    from engines import case

    gumiho = {"method": "gumiho", **({"model": checkpoint} if checkpoint else {})}
    sampling = {"temperature": 0.0, "max_tokens": 256, "ignore_eos": True}
    prompts = [[(7 + 13 * i * j) % 1000 + 5 for j in range(64)] for i in range(1, 9)]
    calls = [{"prompts": prompts[:n], "sampling": sampling} for n in (1, 1, 8)]
    settings = {"enforce_eager": False, "dtype": "auto", "max_model_len": 2048}
    cases = {"off": case(target, None, calls, **settings), "gumiho": case(target, gumiho, calls, **settings)}
    report: dict = {"ok": True}
    for switch in SWITCHES:
        found = run_cases(out, f"speed-{switch}", "v2", switch, cases)
        for name, one in found.pop("cases").items():
            keys = ("seconds", "drafts", "drafted", "accepted", "launches", "error")
            found[name] = {key: one.get(key) for key in keys}
            report["ok"] &= "error" not in one
        report[f"kernels={switch}"] = found
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--target", help="a model to measure (folder or name)")
    parser.add_argument("--checkpoint", help="its Gumiho checkpoint, if the target's own is not to be looked up")
    args = parser.parse_args()
    sys.path[:0] = [str(TESTS.parent), str(TESTS / "support")]
    import torch

    if not torch.cuda.is_available():
        print("no GPU here; the parts of the tests that need none run with make test", file=sys.stderr)
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    report: dict = {}
    for part in args.only:
        if part == "speed" and not args.target:
            continue
        if part == "kernels":
            tests = str(TESTS / "kernels" / "test_kernel_gpu.py")
            report[part] = run(out, part, "-m", "pytest", tests, "-q", "-p", "no:cacheprovider")
            report[part]["ok"] = report[part]["status"] == 0
        elif part == "bench":
            report[part] = run(out, part, "-m", "vllm_gumiho.kernels.bench", "--output", str(out / "bench.json"))
            report[part]["ok"] = report[part]["status"] == 0
        else:
            report[part] = engine(out) if part == "engine" else speed(out, args.target, args.checkpoint)
        print(f"{part}: {'ok' if report[part]['ok'] else 'FAILED'}", flush=True)
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return int(not all(part["ok"] for part in report.values()))


if __name__ == "__main__":
    sys.exit(main())
