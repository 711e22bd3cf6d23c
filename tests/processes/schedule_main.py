"""Requests that join and leave under a schedule: ``python schedule_main.py RUNNER TARGET CHECKPOINT OUT.json``.

Writes the tokens of each request without speculation and with the schedule, and for each step of the latter how many
requests ran and how many tokens each draft that it checked had.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from engine_main import prepare
from engines import UNEQUAL_PROMPTS

SCHEDULE = [[1, 1, 7], [2, 2, 3], [3, 4, 0], [5, 8, 1]]
JOINS_AT = (0, 4, 8, 11, 14)
MAX_TOKENS = (60, 44, 26, 14, 20)


def main() -> None:
    runner, target, checkpoint, out = sys.argv[1:]
    prepare(runner)
    from vllm import LLM, SamplingParams

    def sampling() -> list[SamplingParams]:
        """New ones for each use: `generate` sets in them that only whole outputs are given."""
        return [
            SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, detokenize=False) for most in MAX_TOKENS
        ]

    settings = {
        "model": target,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 256,
        "enforce_eager": True,
        "max_num_seqs": 8,
        "disable_log_stats": False,
    }
    llm = LLM(**settings)
    prompts = [{"prompt_token_ids": ids} for ids in UNEQUAL_PROMPTS]
    off = [list(one.outputs[0].token_ids) for one in llm.generate(prompts, sampling(), use_tqdm=False)]
    llm.llm_engine.engine_core.shutdown()

    speculative = {"method": "gumiho", "model": checkpoint, "num_speculative_tokens_per_batch_size": SCHEDULE}
    llm = LLM(**settings, speculative_config=speculative)
    engine = llm.llm_engine
    on: dict[int, list[int]] = {}
    steps, waiting = [], list(enumerate(prompts))
    while waiting or engine.has_unfinished_requests():
        while waiting and (len(steps) >= JOINS_AT[waiting[0][0]] or not engine.has_unfinished_requests()):
            number, prompt = waiting.pop(0)
            engine.add_request(str(number), prompt, sampling()[number])
        before = counts(llm)
        outputs = engine.step()
        for output in outputs:
            on[int(output.request_id)] = list(output.outputs[0].token_ids)
        drafts, drafted = (now - then for now, then in zip(counts(llm), before, strict=True))
        steps.append({"running": len(outputs), "length": drafted / drafts if drafts else 0})
    engine.engine_core.shutdown()
    used = "v2" if engine.vllm_config.use_v2_model_runner else "v1"
    report = {"runner": used, "off": off, "on": [on[number] for number in range(len(off))], "steps": steps}
    report["max_tokens"] = MAX_TOKENS
    Path(out).write_text(json.dumps(report))


def counts(llm) -> tuple[int, int]:
    """Drafts checked so far and their tokens."""
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return values["vllm:spec_decode_num_drafts"], values["vllm:spec_decode_num_draft_tokens"]


if __name__ == "__main__":
    main()
