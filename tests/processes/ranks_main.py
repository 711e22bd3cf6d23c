"""Rank hits of an engine: ``python ranks_main.py RUNNER LLM.json PROMPTS.json OUT.json``.

The counts, each draft's text with its choices and the tokens that followed, and vLLM's own counters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from engine_main import accepted_per_position, counters, prepare


def main(runner: str, llm_file: str, prompts_file: str, out: str) -> None:
    prepare(runner)
    from vllm import LLM, SamplingParams

    from vllm_gumiho.evaluation.rank_hits import Watch

    llm = LLM(**json.loads(Path(llm_file).read_text()))
    watch, seen = Watch(llm), list[tuple[list[list[int]], list[int]]]()
    count = watch.hits.add

    def counting(choices: list[list[int]], truth: list[int]) -> None:
        seen.append((choices, list(truth)))
        count(choices, truth)

    watch.hits.add = counting
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts_file).read_text())]
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    texts = [list(output.prompt_token_ids) + list(output.outputs[0].token_ids) for output in outputs]
    result = {"hits": watch.hits.plain(), "seen": seen, "texts": texts, "accepted": accepted_per_position(llm)}
    result |= {"counts": counters(llm)}
    Path(out).write_text(json.dumps(result))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
