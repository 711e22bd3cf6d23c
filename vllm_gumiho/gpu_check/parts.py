"""The parts of `gpu-check`: what each runs, and what it must show."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_gumiho.benchmark import shapes
from vllm_gumiho.benchmark.shapes import GUMIHO_RATES, SHAPES
from vllm_gumiho.drafters.gumiho import GUMIHO, LAYERED_GUMIHO
from vllm_gumiho.drafters.kernel_timing import pays
from vllm_gumiho.drafters.moa import MOA
from vllm_gumiho.engines.process import Worker
from vllm_gumiho.engines.worker import kv_cache_of
from vllm_gumiho.env import KERNELS, ONE_PROCESS, V2_RUNNER
from vllm_gumiho.gpu_check.models import Reference, write_models

TASKS = "vllm_gumiho.gpu_check.tasks"
HEADS, K = [1, 2, 3, 4, 5], 7
PROMPTS = [[3 + (i * 7 + j * 5) % 150 for j in range(4 + i * 9)] for i in range(4)]
HOLDS, FAILS, NOT_RUN = "holds", "does not hold", "not run"


@dataclass(frozen=True)
class Machine:
    """Where the parts run: sizes of a GPU, or tiny ones for the same steps on a CPU."""

    gpus: int

    @property
    def on_cpu(self) -> bool:
        """A dry run."""
        return self.gpus == 0

    @property
    def device(self) -> str:
        """Of torch."""
        return "cpu" if self.on_cpu else "cuda"

    @property
    def kernels(self) -> dict[str, Any]:
        """Sizes of the kernels' parts: Llama 3 8B's."""
        if self.on_cpu:
            return {"hidden": 16, "vocab": 333, "batches": [1, 17], "rows": [5, 40, 128]}
        return {"hidden": 4096, "vocab": 128256, "batches": [1, 8, 16, 17, 32], "rows": [1, 5, 8, 32, 40, 64, 128, 320]}

    @property
    def at_once(self) -> list[int]:
        """Requests at once, of the engines' speed."""
        return [1, 2] if self.on_cpu else [1, 8, 32, 64]


@dataclass
class Outcome:
    """Of one part.  problems: what does not hold.  why: of a part that was not run, or a few words of one that was."""

    part: str
    problems: list[str] = field(default_factory=list)
    why: str = ""
    run: bool = True
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """One of three words."""
        return NOT_RUN if not self.run else FAILS if self.problems else HOLDS

    def line(self) -> str:
        """For people."""
        said = "; ".join(self.problems[:3]) + (f"; {len(self.problems) - 3} more" if len(self.problems) > 3 else "")
        return f"{self.part}: {self.state} ({said or self.why})"


class Check:
    """Runs parts one after the other.  deadline: by `time.monotonic`; a part that it ends fails with its reason."""

    def __init__(self, machine: Machine, folder: Path, deadline: float):
        self.machine, self.folder, self.deadline = machine, folder, deadline
        self._own_texts: list[list[int]] = []
        self._models: dict[str, str] = {}

    def worker(self, name: str, job: dict[str, Any], **environment: str) -> Worker:
        """A process for a part; its log stays in the folder."""
        left = max(1.0, self.deadline - time.monotonic())
        return Worker(TASKS, job, name, left, environment, self.folder / f"{name.replace(' ', '-')}.log")

    def kernels(self, part: str) -> Outcome:
        """Every number of heads and every batch tile, right beside a busy stream."""
        sizes, cpu = self.machine.kernels, self.machine.on_cpu
        with self.worker(part, {"interpreter": cpu}) as one:
            found = one.ask(
                "heads",
                hidden=sizes["hidden"],
                counts=HEADS,
                batches=sizes["batches"],
                device=self.machine.device,
                launches=1 if cpu else 20,
            )
        why = f"{found['checked']} shapes by {' and '.join(found['paths'])}"
        return Outcome(part, found["wrong"], why, facts=found)

    def argmax(self, part: str) -> Outcome:
        """Tokens of every number of rows."""
        sizes = self.machine.kernels
        with self.worker(part, {"interpreter": self.machine.on_cpu}) as one:
            asked = {name: sizes[name] for name in ("hidden", "vocab", "rows")}
            found = one.ask("argmax", **asked, device=self.machine.device)
        ways = " and ".join(f"{count} by {way}" for way, count in found["ways"].items())
        return Outcome(part, found["wrong"], f"{found['checked']} numbers of rows: {ways}", facts=found)

    def kernel_speed(self, part: str) -> Outcome:
        """Every shape of the kernels is at least 3 % faster than the library's way; where not, the library is taken."""
        sizes = self.machine.kernels
        with self.worker(part, {"interpreter": self.machine.on_cpu}) as one:
            asked = {name: sizes[name] for name in ("hidden", "vocab", "batches")}
            rows = [count for count in sizes["rows"] if count <= 64]
            found = one.ask("times", **asked, counts=HEADS, rows=rows, device=self.machine.device)
        problems = [
            f"{cell['what']} takes {cell['kernel_us']:.0f} us, the library {cell['library_us']:.0f}"
            for cell in found
            if not pays(cell["kernel_us"], cell["library_us"])
        ]
        if self.machine.on_cpu:
            return Outcome(part, why=f"{len(found)} shapes; times on a CPU say nothing", facts={"cells": found})
        return Outcome(part, problems, f"{len(found)} shapes", facts={"cells": found})

    def engine(self, part: str, runner: str, graphs: bool, drafter: str = GUMIHO.name) -> Outcome:
        """Texts are the target's own, and drafts are those of the drafter's reference."""
        own = self._texts_without_drafts()
        found = self._generate(part, runner, graphs, drafter)
        reference, states = Reference(self._models, drafter), {"equal": 0, "tie": 0, "wrong": 0}
        problems = [] if found["texts"] == own else ["a text is not the target's own"]
        for text, drafted in found["drafts"]:
            states[reference.compare(text, drafted)] += 1
        if states["wrong"] or states["equal"] < 10 * max(1, states["tie"]):
            problems.append(f"drafts are not the reference's: {states}")
        facts = {"drafts": states, "accepted": found["accepted"], "engine": found["engine"]}
        why = f"{states['equal']} drafts of {K} tokens as the reference's, {states['tie']} parted at a tie"
        return Outcome(part, problems, why, facts=facts)

    def tensor_parallel(self, part: str) -> Outcome:
        """Over two GPUs, texts are the target's own and as many drafts are accepted at each position as on one."""
        if self.machine.gpus == 1:
            return Outcome(part, why="one GPU", run=False)
        runner = "v1" if self.machine.on_cpu else "v2"
        own, one = self._texts_without_drafts(), self._generate(f"{part} one", runner, False, record=False)
        two = self._generate(part, runner, not self.machine.on_cpu, record=False, tensor_parallel_size=2)
        problems = [] if two["texts"] == own else ["a text is not the target's own"]
        if two["accepted"] != one["accepted"]:
            problems.append(f"accepted {two['accepted']}, on one {one['accepted']}")
        return Outcome(
            part, problems, f"accepted at each position {two['accepted']}", facts={"accepted": two["accepted"]}
        )

    def engine_speed(self, part: str) -> Outcome:
        """Tokens per second with the kernels on are at least those with them off, less what timing may err."""
        cpu, at_once = self.machine.on_cpu, self.machine.at_once
        name = "tiny" if cpu else "llama-3-8b"
        shape = SHAPES[name] if cpu else dataclasses.replace(SHAPES[name], num_hidden_layers=4)
        rates: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory(prefix="vllm-gumiho-") as folder:
            models = shapes.write_models(shape, Path(folder))
            speculative = {
                "method": "gumiho",
                "model": str(models["gumiho"]),
                "num_speculative_tokens": K,
                "rejection_sample_method": "synthetic",
                "synthetic_acceptance_rates": list(GUMIHO_RATES[:K]),
            }
            llm = {
                "model": str(models["target"]),
                "load_format": "dummy",
                "max_model_len": 512,
                "max_num_seqs": max(at_once),
                "dtype": "float32" if cpu else "bfloat16",
                "enforce_eager": cpu,
                "speculative_config": speculative,
            }
            for switch in ("0", "1" if cpu else "auto"):
                with self._engine(f"{part} {switch}", "v2", llm, switch, record=False) as one:
                    rates[switch] = [self._rate(one, count) for count in at_once]
        off, on = rates.values()
        ratios = dict(zip(at_once, [round(b / a, 3) for a, b in zip(off, on, strict=True)], strict=True))
        problems = [f"{ratio} of the speed at batch {count}" for count, ratio in ratios.items() if ratio < 0.97]
        said = ", ".join(f"{ratio} at {count}" for count, ratio in ratios.items())
        why = f"tokens/s on over off: {said}"
        return Outcome(part, [] if cpu else problems, why, facts={"tokens_per_second": rates, "batches": at_once})

    def _rate(self, engine: Worker, count: int) -> float:
        tokens = 8 if self.machine.on_cpu else 128
        prompts = [[5 + (7 * i + j) % 100 for j in range(32)] for i in range(count)]
        engine.ask("generate", prompts=prompts, max_tokens=tokens // 4)
        found = engine.ask("generate", prompts=prompts, max_tokens=tokens)
        return sum(len(text) for text in found["texts"]) / found["seconds"]

    def _engine(self, name: str, runner: str, llm: dict[str, Any], switch: str, record: bool) -> Worker:
        settings = {"skip_tokenizer_init": True, "disable_log_stats": False, "enable_prefix_caching": False, **llm}
        if not self.machine.on_cpu:
            settings.setdefault("gpu_memory_utilization", 0.5)
        if record and runner == "v1":
            settings["async_scheduling"] = False
        interpreter = self.machine.on_cpu and runner == "v2"
        environment = {ONE_PROCESS.name: "0", KERNELS.name: switch, V2_RUNNER.name: str(int(runner == "v2"))}
        if llm.get("tensor_parallel_size") == 2 and self.machine.on_cpu:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
        return self.worker(name, {"llm": settings, "record": record, "interpreter": interpreter}, **environment)

    def _generate(
        self, name: str, runner: str, graphs: bool, drafter: str | None = GUMIHO.name, record: bool = True, **more: Any
    ) -> dict[str, Any]:
        """Greedy texts of the tiny target in float32.  On a CPU there are no graphs, and no kernels for runner V1.

        drafter: None for no speculation.
        """
        self._models = self._models or write_models(self.folder / "tiny")
        speculative = drafter is not None
        drafts = drafter and {"method": drafter, "model": self._models[drafter], "num_speculative_tokens": K}
        llm = {
            "model": self._models["target"],
            "dtype": "float32",
            "max_model_len": 256,
            "max_num_seqs": 8,
            "enforce_eager": not graphs or self.machine.on_cpu,
            # Kernels are compiled when they are first used: ahead it takes twenty seconds more, for shapes never met.
            "kernel_config": {"enable_jit_warmup": False},
            **({"speculative_config": drafts} if speculative else {}),
            **({} if self.machine.on_cpu else {"attention_backend": "TRITON_ATTN", **kv_cache_of(1)}),
            **more,
        }
        switch = "0" if not speculative or (self.machine.on_cpu and runner == "v1") else "1"
        with self._engine(name, runner, llm, switch, record and speculative) as one:
            return one.ask("generate", prompts=PROMPTS, max_tokens=24) | {"engine": one.started}

    def _texts_without_drafts(self) -> list[list[int]]:
        if not self._own_texts:
            found = self._generate("no speculation", "v1", False, None)
            self._own_texts = found["texts"]
        return self._own_texts


Run = Callable[[Check, str], Outcome]
# By name, with the seconds that a part is given room for on a GPU.
PARTS: dict[str, tuple[Run, float]] = {
    "heads kernel": (Check.kernels, 60),
    "argmax kernel": (Check.argmax, 30),
    "speed of kernels": (Check.kernel_speed, 40),
    "V2 graphs": (lambda check, part: check.engine(part, "v2", True), 60),
    "V2 eager": (lambda check, part: check.engine(part, "v2", False), 40),
    "V1 graphs": (lambda check, part: check.engine(part, "v1", True), 60),
    "V1 eager": (lambda check, part: check.engine(part, "v1", False), 40),
    "tensor parallel 2": (Check.tensor_parallel, 90),
    "speed of engines": (Check.engine_speed, 90),
    # Last, as all before them take nine minutes.
    "V2 graphs, several layers": (lambda check, part: check.engine(part, "v2", True, LAYERED_GUMIHO.name), 60),
    "V2 graphs, MoA": (lambda check, part: check.engine(part, "v2", True, MOA.name), 60),
    "V1 graphs, several layers": (lambda check, part: check.engine(part, "v1", True, LAYERED_GUMIHO.name), 60),
    "V1 graphs, MoA": (lambda check, part: check.engine(part, "v1", True, MOA.name), 60),
}
