"""The grid of cells that a benchmark's settings make, checked before any engine starts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_gumiho.benchmark.arguments import check_engine_args, split
from vllm_gumiho.benchmark.settings import METHODS, MODES, Settings, check
from vllm_gumiho.drafters import DEFAULT, DRAFTERS
from vllm_gumiho.engines.facts import default_dtype, on_cpu
from vllm_gumiho.engines.prompts import QUESTIONS
from vllm_gumiho.engines.target import find_target
from vllm_gumiho.errors import BenchError
from vllm_gumiho.evaluation import plan
from vllm_gumiho.evaluation.sets import read_set
from vllm_gumiho.files import sha256_of
from vllm_gumiho.request.per_request import PER_REQUEST


@dataclass(frozen=True)
class Variant:
    """One way to decode: a method, its K (0 without speculation) or "auto", and vLLM's speculative config for it."""

    method: str
    length: int | str = 0
    speculative: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        by_request = (self.speculative or {}).get(PER_REQUEST)
        ends = "" if by_request is None else f" {by_request}"
        return "off" if self.method == "none" else f"{self.method} K={self.length}{ends}"


@dataclass(frozen=True)
class Grid:
    """Cells to run: every mode, variant and concurrency, each ``repeats`` times.

    engine_args: what follows ``vllm serve TARGET``; request_args: what follows ``vllm bench serve``, which offline
    runs take their requests from too.  interpreter: run the kernels of model runner V2 in Triton's interpreter.
    assumed: what of the figures is assumed and not measured, for captions.
    """

    target: str
    variants: tuple[Variant, ...]
    engine_args: tuple[str, ...]
    request_args: tuple[str, ...]
    modes: tuple[str, ...] = MODES
    concurrency: tuple[int, ...] = (1,)
    num_prompts: int = 16
    repeats: int = 3
    profile_steps: int = 8
    interpreter: bool = False
    assumed: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)

    def engine_argv(self, variant: Variant) -> list[str]:
        """Arguments of ``vllm serve`` for a variant, the target first."""
        speculative = ["--speculative-config", json.dumps(variant.speculative)] if variant.speculative else []
        # Under async scheduling a step's rows are set before they are drafted.
        at_once = ["--no-async-scheduling"] if PER_REQUEST in (variant.speculative or {}) else []
        return [self.target, *self.engine_args, *speculative, *at_once]

    def request_argv(self, concurrency: int) -> list[str]:
        """Arguments of ``vllm bench serve`` for a cell; at least two requests for each at once."""
        count = max(self.num_prompts, 2 * concurrency)
        return [*self.request_args, "--num-prompts", str(count), "--max-concurrency", str(concurrency)]

    def identity(self) -> dict[str, Any]:
        """All that makes a finished cell another cell; more repeats do not."""
        known = asdict(self)
        del known["repeats"], known["assumed"]
        return json.loads(json.dumps(known))


def make_grid(settings: Settings, output: Path) -> Grid:
    """The grid for a user's settings; a prompt file goes to ``output`` as vLLM's 'custom' dataset.

    Raises: BenchError, PromptError, TargetError, CheckpointError naming the option that is wrong.
    """
    check(settings)
    target = find_target(settings.target)
    variants = tuple(_variants(settings, target))
    engine_args = ["--seed", str(settings.seed), "--max-num-seqs", str(max(settings.concurrency))]
    engine_args += ["--dtype", settings.dtype or default_dtype(), "--no-enable-prefix-caching"]
    if settings.max_model_len is not None:
        engine_args += ["--max-model-len", str(settings.max_model_len)]
    if on_cpu() if settings.enforce_eager is None else settings.enforce_eager:
        engine_args += ["--enforce-eager"]
    engine_args += split("--engine-args", settings.engine_args)
    if settings.engine_args:
        check_engine_args([target, *engine_args])
    request_args = ["--output-len", str(settings.output_len), "--temperature", f"{settings.temperature:g}"]
    request_args += ["--ignore-eos"] if settings.ignore_eos else []
    request_args += ["--seed", str(settings.seed), *_dataset(settings, output)]
    request_args += split("--bench-args", settings.bench_args)
    inputs: dict[str, Any] = {
        str(variant.speculative["model"]): plan.weight_digests(variant.speculative["model"])
        for variant in variants
        if variant.speculative and "model" in variant.speculative
    }
    inputs[target] = plan.weight_digests(target)
    if "--dataset-path" in request_args:
        file = Path(request_args[request_args.index("--dataset-path") + 1])
        inputs["dataset"] = sha256_of(file) if file.is_file() else None
    return Grid(
        target,
        variants,
        tuple(engine_args),
        tuple(request_args),
        settings.modes,
        settings.concurrency,
        settings.num_prompts,
        settings.repeats,
        inputs=inputs,
    )


def _variants(settings: Settings, target: str) -> list[Variant]:
    found = [Variant("none")]
    others = {*DRAFTERS} - {DEFAULT.name} | ({"eagle"} if settings.eagle_checkpoint is None else set())
    asked = settings.methods or tuple(method for method in METHODS if method not in others)
    ours: dict[str, str] = {}
    for method in asked:
        if method == "none":
            continue
        checkpoint = settings.eagle_checkpoint if method == "eagle" else settings.checkpoint
        drafter = plan.find_drafter(method, checkpoint, settings.num_speculative_tokens, target)
        if method in DRAFTERS and (same := ours.setdefault(str(drafter.path), method)) != method:
            raise BenchError(
                f"--method {same} and --method {method} would both measure {drafter.path}; give one of them, and "
                "compare two checkpoints by a bench of each"
            )
        found += [
            Variant(method, k, plan.speculative_config(method, drafter, k, settings.per_request))
            for k in drafter.lengths
        ]
    return found


def _dataset(settings: Settings, output: Path) -> list[str]:
    """Arguments that name the dataset.  A file of conversations becomes a 'custom' one of their first turns."""
    if settings.dataset_name is not None:
        path = ["--dataset-path", settings.dataset_path] if settings.dataset_path else []
        return ["--dataset-name", settings.dataset_name, *path]
    turns = QUESTIONS if settings.prompts is None else [prompt.turns[0] for prompt in read_set(settings.prompts)]
    file = output.resolve() / "prompts.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"prompt": turn}) + "\n" for turn in turns))
    return ["--dataset-name", "custom", "--dataset-path", str(file), "--disable-shuffle"]
