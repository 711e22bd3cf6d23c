"""Feature tests: cases with speculation off and with Gumiho, in one engine process, compared step by step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

MAIN = Path(__file__).with_name("features_main.py")


def greedy(max_tokens: int = 24, **more) -> dict:
    return {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True} | more


def generate(prompts: list, sampling: dict | list[dict], **more) -> dict:
    return {"do": "generate", "prompts": prompts, "sampling": sampling, **more}


def gumiho(checkpoint: Path, **more) -> dict:
    return {"method": "gumiho", "model": str(checkpoint), **more}


def pair(target: Path, checkpoint: Path, steps: dict[str, dict], name: str = "", **llm) -> dict[str, dict]:
    """Two cases, ``off`` and ``on`` (after ``name``), that differ in speculation only."""
    settings = {"model": str(target), **llm}
    speculative = gumiho(checkpoint, **settings.pop("speculative", {}))
    prefix = f"{name} " if name else ""
    return {
        f"{prefix}off": {"llm": settings, "steps": steps},
        f"{prefix}on": {"llm": settings | {"speculative_config": speculative}, "steps": steps},
    }


def run(folder: Path, cases: dict[str, dict], runner: str = "v1", env: dict[str, str] | None = None) -> dict[str, dict]:
    """Results by case.  A case's steps are by name; a case that did not start has an ``error``; ``log`` is shared."""
    job, result = folder / "job.json", folder / "result.json"
    listed = {name: case | {"steps": list(case["steps"].values())} for name, case in cases.items()}
    job.write_text(json.dumps({"runner": runner, "cases": listed}))
    done = subprocess.run(
        [sys.executable, str(MAIN), str(job), str(result)], env={**os.environ, **(env or {})},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    log = done.stdout + done.stderr
    assert result.exists(), f"engine process ended with {done.returncode}:\n{log[-6000:]}"
    results = json.loads(result.read_text())
    for name, value in results.items():
        value["log"] = log
        if "steps" in value:
            value["steps"] = dict(zip(cases[name]["steps"], value["steps"], strict=True))
    return results


def step(results: dict, case: str, name: str) -> dict:
    """A step's entry, which must not be an error."""
    assert "error" not in results[case], f"{case}: {results[case]['error']}\n{results[case]['log'][-3000:]}"
    entry = results[case]["steps"][name]
    assert "error" not in entry, f"{case}, {name}: {entry['error']}"
    return entry


def tokens(entry: dict) -> list:
    """Token ids of every completion of every request of a step."""
    return [output["tokens"] for output in entry["result"]]


def assert_same(results: dict, name: str, on: str = "on", off: str = "off", rejected: bool = True) -> dict:
    """The step's entry ``on``: the same tokens, texts and reasons as ``off``; drafts were accepted, and rejected."""
    plain, drafted = step(results, off, name), step(results, on, name)
    for field in ("tokens", "texts", "finish", "stop"):
        assert [o[field] for o in drafted["result"]] == [o[field] for o in plain["result"]], f"{name}: {field} differ"
    assert plain["counts"]["drafts"] == 0
    assert drafted["counts"]["accepted"] > 0, f"{name}: no draft was accepted"
    if rejected:
        assert drafted["counts"]["accepted"] < drafted["counts"]["drafted"], f"{name}: no draft was rejected"
    return drafted


def cut_tokens(entry: dict) -> int:
    """Accepted tokens that were not given out, as the request ended before them in a draft.

    Of each request, the first token comes from the prompt; each draft then gives one token and those accepted.
    """
    counts = entry["counts"]
    given = sum(len(one) for output in entry["result"] for one in output["tokens"])
    return len(entry["result"]) + counts["drafts"] + counts["accepted"] - given
