"""Starting real engines from tests, several cases to a process, and comparing them step by step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from places import PROCESSES, SUPPORT

MAIN = PROCESSES / "engine_main.py"
# One core for each of two workers.
CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
GREEDY = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
UNEQUAL_PROMPTS = [[3 + (i * 7 + j * 5) % 150 for j in range(4 + i * 9)] for i in range(5)]


def environment() -> dict[str, str]:
    """This process's environment, for scripts of ``processes`` that use what is in ``support``."""
    path = os.pathsep.join(filter(None, (str(SUPPORT), str(PROCESSES), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


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
        [sys.executable, str(MAIN), str(job), str(result)],
        env={**environment(), **(env or {})},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    log = done.stdout + done.stderr
    assert result.exists(), f"engine process ended with {done.returncode}:\n{log[-6000:]}"
    results = json.loads(result.read_text())
    for name, value in results.items():
        value["log"] = log
        if "steps" in value:
            value["steps"] = dict(zip(cases[name]["steps"], value["steps"], strict=True))
            assert_drafts_are_those_of_the_equations(name, value)
    return results


def engine_configs(folder: Path, model: Path, cases: dict[str, dict]) -> dict[str, dict]:
    """Settings or error of each case's engine config, ``{argument of EngineArgs: value}``; no engine is made."""
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps({"model": str(model), "cases": cases}))
    done = subprocess.run(
        [sys.executable, str(PROCESSES / "config_main.py"), str(job), str(result)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())["results"]


def assert_drafts_are_those_of_the_equations(name: str, result: dict) -> None:
    """Every draft of a case, whatever its steps are about, so that no wrong one hides behind a right text."""
    found = result["facts"]["drafts"]
    if found is not None:
        assert not found["wrong"], f"{name}, of {found['compared']} draft tokens: {found['wrong']}"
        drafted = sum(entry["counts"]["drafted"] for entry in result["steps"].values())
        assert found["compared"] or not drafted, f"{name}: no draft was compared"


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


def assert_same_beginnings(off: dict, on: dict) -> list[int]:
    """Of requests that may have been aborted: both have the same tokens as far as both go; how far that is, of each."""
    lengths = []
    for i, (a, b) in enumerate(zip(off["result"]["outputs"], on["result"]["outputs"], strict=True)):
        lengths.append(min(len(a["tokens"][0]), len(b["tokens"][0])))
        assert lengths[-1] > 0
        assert a["tokens"][0][: lengths[-1]] == b["tokens"][0][: lengths[-1]], f"request {i}"
    return lengths


def cut_tokens(entry: dict) -> int:
    """Accepted tokens that were not given out, as the request ended before them in a draft.

    Of each request, the first token comes from the prompt; each draft then gives one token and those accepted.
    """
    counts = entry["counts"]
    given = sum(len(one) for output in entry["result"] for one in output["tokens"])
    return len(entry["result"]) + counts["drafts"] + counts["accepted"] - given


def case(model: Path | str, speculative: dict | None = None, calls: list[dict] | None = None, **llm) -> dict:
    """A case of token ids alone; by default greedy decoding of `UNEQUAL_PROMPTS`."""
    settings = {"model": str(model), "skip_tokenizer_init": True, **llm}
    if speculative is not None:
        settings["speculative_config"] = speculative
    asked = calls or [{"prompts": UNEQUAL_PROMPTS, "sampling": GREEDY}]
    return {
        "llm": settings,
        "steps": {
            str(number): generate(call["prompts"], _without_text(call["sampling"])) for number, call in enumerate(asked)
        },
    }


def _without_text(sampling: dict | list[dict]) -> dict | list[dict]:
    return [_without_text(one) for one in sampling] if isinstance(sampling, list) else {"detokenize": False} | sampling


def run_engines(folder: Path, runner: str, cases: dict[str, dict], env: dict[str, str] | None = None) -> dict:
    """What `case` cases gave, by name: the engine's facts, tokens of each call, and counts of all calls together.

    A case that raised has an ``error`` of ``Type: message``; ``draft_tokens`` are those of cases that record.
    """
    results = {}
    for name, found in run(folder, cases, runner, env).items():
        results[name] = {"log": found["log"]}
        if "error" in found:
            results[name]["error"] = found["error"]
            continue
        steps = [step({name: found}, name, number) for number in found["steps"]]
        facts = found["facts"]
        results[name] |= facts | {
            "tokens": [tokens(entry) for entry in steps],
            "accepted": facts["accepted per position"],
        }
        results[name] |= {key: sum(entry["counts"][key] for entry in steps) for key in ("drafts", "drafted")}
        results[name] |= {
            "seconds": [entry["seconds"] for entry in steps],
            "draft_tokens": sorted({token for _, drafted in found["drafts"] for token in drafted}),
        }
    return results
