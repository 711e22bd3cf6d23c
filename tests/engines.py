"""Starting real engines from tests, several cases to a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

MAIN = Path(__file__).with_name("engine_main.py")
GREEDY = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
UNEQUAL_PROMPTS = [[3 + (i * 7 + j * 5) % 150 for j in range(4 + i * 9)] for i in range(5)]


def run_engines(folder: Path, runner: str, cases: dict[str, dict], env: dict[str, str] | None = None) -> dict:
    """Results of the cases by name.  A case that raised has an ``error`` of ``Type: message``."""
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps({"runner": runner, "cases": cases}))
    done = subprocess.run(
        [sys.executable, str(MAIN), str(job), str(result)], env={**os.environ, **(env or {})},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert result.exists(), (
        f"engine process ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    results = json.loads(result.read_text())
    for value in results.values():
        value["log"] = done.stdout + done.stderr
    return results


def case(model: Path | str, speculative: dict | None = None, calls: list[dict] | None = None, **llm) -> dict:
    """One engine case; by default greedy decoding of `UNEQUAL_PROMPTS`."""
    settings = {"model": str(model), **llm}
    if speculative is not None:
        settings["speculative_config"] = speculative
    return {"llm": settings, "calls": calls or [{"prompts": UNEQUAL_PROMPTS, "sampling": GREEDY}]}
