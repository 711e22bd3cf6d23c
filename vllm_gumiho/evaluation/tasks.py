"""What the judge asks of an engine in a process of its own: answers to sets of prompts, and what was counted.

An n-gram engine leaves a process in which no other drafter starts, and memory is given back only at the end of one.
"""

from __future__ import annotations

import time
from typing import Any

from vllm_gumiho.engines.counters import read_counts
from vllm_gumiho.engines.prompts import render
from vllm_gumiho.engines.worker import start_engine


def start(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The engine.  Every method is judged with the right sampler, not only ours, whose engines correct it."""
    from vllm.platforms import current_platform

    llm, facts = start_engine(job)
    llm.ranks = None
    if job.get("rank hits"):
        from vllm_gumiho.evaluation.rank_hits import Watch

        llm.ranks = Watch(llm)
    if current_platform.is_cpu():
        from vllm_gumiho.plugin.cpu_sampling import correct_expansion

        correct_expansion()
    return llm, facts


def warm(llm: Any, prompts: list[dict[str, Any]]) -> None:
    """A few tokens, which pay for what is made on first use."""
    _answer(llm, prompts, temperature=0, max_tokens=4)


def answer_set(
    llm: Any, prompts: list[dict[str, Any]], temperature: float, max_tokens: int, seed: int
) -> dict[str, Any]:
    """``seconds``, ``counts`` and ``answers`` (token ids of each turn, by prompt id) of one set of prompts.

    And ``rank_hits``, None where they are not counted.
    """
    from vllm.utils.torch_utils import set_random_seed

    # A set's draws do not depend on which sets came before it.
    set_random_seed(seed)
    if llm.ranks is not None:
        llm.ranks.begin()
    before = read_counts(llm.get_metrics())
    start = time.perf_counter()
    answers = _answer(llm, prompts, temperature, max_tokens)
    seconds = time.perf_counter() - start
    counts = vars(read_counts(llm.get_metrics()) - before)
    hits = None if llm.ranks is None else llm.ranks.hits.plain()
    return {"seconds": seconds, "counts": counts, "answers": answers, "rank_hits": hits}


def _answer(llm: Any, prompts: list[dict[str, Any]], temperature: float, max_tokens: int) -> dict[str, list[list[int]]]:
    """The engine's own answers stand in the later turns' conversations."""
    from vllm import SamplingParams

    sampling, tokenizer = SamplingParams(temperature=temperature, max_tokens=max_tokens), llm.get_tokenizer()
    talks: dict[str, list[dict[str, str]]] = {prompt["id"]: [] for prompt in prompts}
    answers: dict[str, list[list[int]]] = {prompt["id"]: [] for prompt in prompts}
    for turn in range(max(len(prompt["turns"]) for prompt in prompts)):
        going = [prompt for prompt in prompts if turn < len(prompt["turns"])]
        for prompt in going:
            talks[prompt["id"]].append({"role": "user", "content": prompt["turns"][turn]})
        asked = [{"prompt_token_ids": render(tokenizer, talks[prompt["id"]])} for prompt in going]
        for prompt, out in zip(going, llm.generate(asked, sampling, use_tqdm=False), strict=True):
            answers[prompt["id"]].append(list(out.outputs[0].token_ids))
            talks[prompt["id"]].append({"role": "assistant", "content": out.outputs[0].text})
    return answers


TASKS = {"warm": warm, "answer set": answer_set}
