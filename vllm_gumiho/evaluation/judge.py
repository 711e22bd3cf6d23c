"""Judging a drafter: a grid of real engines over prompt sets, each in its own process, and one JSON report."""

from __future__ import annotations

import datetime
from typing import Any

from rich.console import Console

from vllm_gumiho.engines.counters import Counts, acceptance
from vllm_gumiho.engines.facts import default_dtype, machine, on_cpu, versions, with_python
from vllm_gumiho.engines.process import Worker
from vllm_gumiho.engines.prompts import Prompt
from vllm_gumiho.engines.target import find_target
from vllm_gumiho.env import ONE_PROCESS
from vllm_gumiho.errors import EvalError
from vllm_gumiho.evaluation import plan
from vllm_gumiho.evaluation.baseline import Answers, Identity, load, pack
from vllm_gumiho.evaluation.metrics import differences, mean_over_sets
from vllm_gumiho.evaluation.rank_hits import add_up
from vllm_gumiho.evaluation.report import run_title, set_line, show
from vllm_gumiho.evaluation.sets import Fitting, fit, read_sets
from vllm_gumiho.evaluation.settings import Settings, check_settings
from vllm_gumiho.files import check_writable, write_json
from vllm_gumiho.request.lengths import AUTO, TOKENS
from vllm_gumiho.request.per_request import PER_REQUEST

TASKS = "vllm_gumiho.evaluation.tasks"


def judge(settings: Settings, console: Console) -> dict[str, Any]:
    """Run the grid, write the report after each engine and return it.  ``report["different"]`` counts prompts whose
    greedy output is not that without speculation, over all runs.

    Raises: PromptError, EvalError and CheckpointError, before any engine starts where that can be known; EngineError.
    """
    check_settings(settings)
    sets = read_sets(settings.prompts, settings.limit, settings.all_turns)
    target = find_target(settings.target)
    drafter = plan.find_drafter(settings.method, settings.checkpoint, settings.num_speculative_tokens, target)
    check_writable(settings.output)
    digests = plan.weight_digests(target)
    dtype = settings.dtype or default_dtype()
    identity = Identity(digests or target, dtype, settings.max_tokens, settings.all_turns)
    fitting = _fit(settings, target, sets)
    off: dict[str, Answers] | None = None
    if settings.baseline is not None and 0 in settings.temperatures:
        off = load(settings.baseline, identity, fitting.sets)

    report: dict[str, Any] = {
        "complete": False,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": with_python(versions()),
        "machine": machine(),
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

    engines: list[tuple[str, int | str, tuple[float, ...]]] = [
        (settings.method, length, settings.temperatures) for length in drafter.lengths
    ]
    if off is None and settings.method != "none" and 0 in settings.temperatures and not settings.rank_hits:
        engines.insert(0, ("none", 0, (0.0,)))
    llm = {
        "model": target,
        "dtype": dtype,
        "max_model_len": fitting.max_model_len,
        "disable_log_stats": False,
        "max_num_seqs": settings.concurrency,
        "enable_prefix_caching": False,
        "seed": settings.seed,
        "enforce_eager": on_cpu() if settings.enforce_eager is None else settings.enforce_eager,
    }
    for number, (method, length, temperatures) in enumerate(engines, 1):
        speculative = plan.speculative_config(method, drafter, length, settings.per_request)
        facts: dict[str, Any] = {"method": method, "num_speculative_tokens": length, "speculative_config": speculative}
        runs = _run(llm, facts, temperatures, settings, fitting, off, console)
        if method == "none":
            greedy = [answers for run, answers in runs if run["temperature"] == 0]
            off = greedy[0] if greedy else off
        for run, _ in runs:
            report["runs"].append(run)
            report["different"] += sum(len(one["different"]) for one in run["sets"].values())
            show(console, run)
        report["complete"] = number == len(engines)
        write_json(settings.output, report)
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
    llm: dict[str, Any],
    facts: dict[str, Any],
    temperatures: tuple[float, ...],
    settings: Settings,
    fitting: Fitting,
    off: dict[str, Answers] | None,
    console: Console,
) -> list[tuple[dict[str, Any], dict[str, Answers]]]:
    """A run record and the answers for each temperature of one engine."""
    speculative = facts["speculative_config"]
    job: dict[str, Any] = {"llm": llm | ({"speculative_config": speculative} if speculative else {})}
    if settings.rank_hits and speculative:
        job |= {"llm": job["llm"] | {"enforce_eager": True, "async_scheduling": False}, "rank hits": True}
    if PER_REQUEST in (speculative or {}):
        job |= {"llm": job["llm"] | {"async_scheduling": False}}
    asked = {name: [{"id": p.id, "turns": p.turns} for p in prompts] for name, prompts in fitting.sets.items()}
    runs: list[tuple[dict[str, Any], dict[str, Answers]]] = []
    # In this one's process: memory and counters of workers are then read where they are.
    environment = {ONE_PROCESS.name: "0"}
    if (speculative or {}).get(TOKENS) == AUTO:
        console.print(
            f"{run_title(facts)}: where no schedule is stored for this machine it is measured first, some minutes",
            highlight=False,
            markup=False,
        )
    with (
        console.status(f"{run_title(facts)}: engine running"),
        Worker(TASKS, job, f"{run_title(facts)}: the engine", environment=environment) as engine,
    ):
        facts = facts | {"num_speculative_tokens": engine.started["draft_length"]}  # "auto" is a number now
        engine.ask("warm", prompts=next(iter(asked.values()))[:1])
        for temperature in temperatures:
            run = {**facts, "temperature": temperature, "engine": engine.started, "sets": {}}
            answers: dict[str, Answers] = {}
            for name, prompts in asked.items():
                line = engine.ask(
                    "answer set",
                    prompts=prompts,
                    temperature=temperature,
                    max_tokens=settings.max_tokens,
                    seed=settings.seed,
                )
                answers[name] = line["answers"]
                compared = off is not None and temperature == 0 and facts["method"] != "none"
                run["sets"][name] = _set(line, facts, off[name] if off and compared else None, fitting.sets[name])
                console.print(set_line(run, name, run["sets"][name]), highlight=False, markup=False)
            run["mean"] = mean_over_sets(list(run["sets"].values()))
            if "rank hits" in job:
                run["mean"]["rank_hits"] = add_up([one["rank_hits"] for one in run["sets"].values()])
            if run["method"] == "none" and temperature == 0:
                run["outputs"] = {name: pack(fitting.sets[name], of) for name, of in answers.items()}
            runs.append((run, answers))
    return runs


def _set(line: dict[str, Any], facts: dict[str, Any], off: Answers | None, prompts: list[Prompt]) -> dict[str, Any]:
    """Figures of one set; ``different`` are answers that are not those of ``off``."""
    answers = line["answers"]
    found = None if off is None else differences(off, answers, [prompt.id for prompt in prompts])
    tokens = sum(len(turn) for turns in answers.values() for turn in turns)
    return {
        "prompts": len(prompts),
        "output_tokens": tokens,
        "seconds": line["seconds"],
        "output_tokens_per_s": tokens / line["seconds"],
        **line["counts"],
        **acceptance(Counts(**line["counts"]), facts["num_speculative_tokens"]),
        "equal": None if found is None else len(prompts) - len(found),
        "different": found or [],
        **({"rank_hits": line["rank_hits"]} if line["rank_hits"] is not None else {}),
    }
