"""What a benchmark is asked for and the grid of cells that comes of it, checked before any engine starts."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_gumiho.benchmark import BenchError
from vllm_gumiho.evaluation import plan
from vllm_gumiho.evaluation.prompts import read_set

METHODS = ("none", "ngram", "eagle", "gumiho")
MODES = ("offline", "server")


@dataclass(frozen=True)
class Settings:
    """What the user asks for; tuples make the grid.  ``num_prompts`` is the least a cell gets."""

    target: str = "smollm2"
    methods: tuple[str, ...] = ()
    checkpoint: str | None = None
    eagle_checkpoint: str | None = None
    num_speculative_tokens: tuple[int, ...] = (3, 7)
    modes: tuple[str, ...] = MODES
    max_concurrency: tuple[int, ...] = (1, 4, 16)
    prompts: Path | None = None
    dataset_name: str | None = None
    dataset_path: str | None = None
    num_prompts: int = 16
    output_len: int = 128
    temperature: float = 0.0
    ignore_eos: bool = False
    repeats: int = 3
    dtype: str | None = None
    enforce_eager: bool | None = None
    max_model_len: int | None = None
    engine_args: str = ""
    bench_args: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Variant:
    """One way to decode: a method, its K (0 without speculation) and vLLM's speculative config for it."""

    method: str
    length: int = 0
    speculative: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        return "off" if self.method == "none" else f"{self.method} K={self.length}"


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
        return [self.target, *self.engine_args, *speculative]

    def request_argv(self, concurrency: int) -> list[str]:
        """Arguments of ``vllm bench serve`` for a cell; at least two requests for each that runs at a time."""
        count = max(self.num_prompts, 2 * concurrency)
        return [*self.request_args, "--num-prompts", str(count), "--max-concurrency", str(concurrency)]

    def identity(self) -> dict[str, Any]:
        """All that makes a finished cell another cell; more repeats do not."""
        known = asdict(self)
        del known["repeats"], known["assumed"]
        return json.loads(json.dumps(known))


def make_grid(settings: Settings, output: Path) -> Grid:
    """The grid for a user's settings; a prompt file goes to ``output`` as vLLM's 'custom' dataset.

    Raises: BenchError, EvalError, CheckpointError naming the option that is wrong.
    """
    check(settings)
    target = plan.find_target(settings.target)
    variants = tuple(_variants(settings, target))
    engine_args = ["--seed", str(settings.seed), "--max-num-seqs", str(max(settings.max_concurrency))]
    engine_args += ["--dtype", settings.dtype or plan.default_dtype(), "--no-enable-prefix-caching"]
    if settings.max_model_len is not None:
        engine_args += ["--max-model-len", str(settings.max_model_len)]
    if plan.on_cpu() if settings.enforce_eager is None else settings.enforce_eager:
        engine_args += ["--enforce-eager"]
    engine_args += _split("--engine-args", settings.engine_args)
    if settings.engine_args:
        _check_engine_args([target, *engine_args])
    request_args = ["--output-len", str(settings.output_len), "--temperature", f"{settings.temperature:g}"]
    request_args += ["--ignore-eos"] if settings.ignore_eos else []
    request_args += ["--seed", str(settings.seed), *_dataset(settings, output)]
    request_args += _split("--bench-args", settings.bench_args)
    inputs: dict[str, Any] = {str(variant.speculative["model"]): plan.weight_digests(variant.speculative["model"])
              for variant in variants if variant.speculative and "model" in variant.speculative}  # fmt: skip
    inputs[target] = plan.weight_digests(target)
    if "--dataset-path" in request_args:
        inputs["dataset"] = digest(Path(request_args[request_args.index("--dataset-path") + 1]))
    return Grid(
        target, variants, tuple(engine_args), tuple(request_args), settings.modes, settings.max_concurrency,
        settings.num_prompts, settings.repeats, inputs=inputs,
    )  # fmt: skip


def check(settings: Settings) -> None:
    """Raises: BenchError for a value out of range, given twice, or with nothing to go with."""
    for option, values, known in (("--method", settings.methods, METHODS), ("--mode", settings.modes, MODES)):
        for value in values:
            if value not in known:
                raise BenchError(f"{option} {value!r}: no such one; give one of {', '.join(known)}")
    for name in ("methods", "modes", "max_concurrency", "num_speculative_tokens"):
        values = getattr(settings, name)
        if len(set(values)) < len(values):
            raise BenchError(f"--{name.rstrip('s').replace('_', '-')}: a value is given twice: {list(values)}")
    for name in ("max_concurrency", "num_speculative_tokens"):
        values = getattr(settings, name)
        if not values or min(values) < 1:
            raise BenchError(f"--{name.replace('_', '-')} {list(values)}: give whole numbers from 1")
    for name in ("num_prompts", "output_len", "repeats"):
        if getattr(settings, name) < 1:
            raise BenchError(f"--{name.replace('_', '-')} {getattr(settings, name)}: give a whole number from 1")
    if settings.temperature < 0:
        raise BenchError(f"--temperature {settings.temperature:g}: give 0 (greedy) or a positive number")
    if "eagle" in settings.methods and settings.eagle_checkpoint is None:
        raise BenchError("--method eagle needs --eagle-checkpoint FOLDER, an EAGLE drafter of this target")
    if settings.prompts is not None and settings.dataset_name is not None:
        raise BenchError("--prompts and --dataset-name: two sources of prompts; give one of them")
    if settings.prompts is not None and not settings.prompts.is_file():
        raise BenchError(f'--prompts {settings.prompts}: no such file; give JSON lines of {{"id", "turns"}}')
    if settings.dataset_path is not None and settings.dataset_name is None:
        raise BenchError("--dataset-path needs --dataset-name, one of those of 'vllm bench serve --help'")


def digest(path: Path) -> str | None:
    """SHA-256 of a file, None for what is not one."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _variants(settings: Settings, target: str) -> list[Variant]:
    found = [Variant("none")]
    asked = settings.methods or tuple(m for m in METHODS if m != "eagle" or settings.eagle_checkpoint is not None)
    for method in asked:
        if method == "none":
            continue
        checkpoint = {"gumiho": settings.checkpoint, "eagle": settings.eagle_checkpoint}.get(method)
        one = plan.Settings(
            target, Path(), Path(), method, checkpoint, num_speculative_tokens=settings.num_speculative_tokens
        )
        drafter = plan.find_drafter(one, target)
        found += [Variant(method, k, plan.speculative_config(one, drafter, k)) for k in drafter.lengths]
    return found


def _dataset(settings: Settings, output: Path) -> list[str]:
    """Arguments that name the dataset.  A file of conversations becomes a 'custom' one of their first turns."""
    if settings.dataset_name is not None:
        path = ["--dataset-path", settings.dataset_path] if settings.dataset_path else []
        return ["--dataset-name", settings.dataset_name, *path]
    if settings.prompts is None:
        from vllm_gumiho.demo import PROMPTS

        turns = list(PROMPTS)
    else:
        turns = [prompt.turns[0] for prompt in read_set(settings.prompts)]
    file = output.resolve() / "prompts.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"prompt": turn}) + "\n" for turn in turns))
    return ["--dataset-name", "custom", "--dataset-path", str(file), "--disable-shuffle"]


def _split(option: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BenchError(f"{option} {text!r}: not a command line ({error}); close its quotes") from error


def _check_engine_args(argv: list[str]) -> None:
    import contextlib
    import io

    from vllm_gumiho.benchmark.offline import parse_engine_args

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse_engine_args(argv)
    except SystemExit as error:
        reason = (said.getvalue().strip().splitlines() or ["refused"])[-1]
        raise BenchError(f"--engine-args: vLLM does not take them: {reason}; see 'vllm serve --help'") from error
