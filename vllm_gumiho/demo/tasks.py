"""What the demonstration asks of an engine in a process of its own."""

from __future__ import annotations

import time
from typing import Any

from vllm_gumiho.engines.counters import read_counts
from vllm_gumiho.engines.prompts import QUESTIONS, render


def chat(llm: Any, max_tokens: int) -> dict[str, Any]:
    """Greedy answers to the built-in questions: ``texts``, ``tokens``, ``seconds`` and what was counted."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    llm.chat(conversations[:1], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    before = read_counts(llm.get_metrics())
    start = time.perf_counter()
    outputs = [output.outputs[0] for output in llm.chat(conversations, sampling, use_tqdm=False)]
    seconds = time.perf_counter() - start
    counts = read_counts(llm.get_metrics()) - before
    return {
        "texts": [output.text for output in outputs],
        "tokens": [list(output.token_ids) for output in outputs],
        "seconds": seconds,
        "counts": vars(counts),
    }


def gap(llm: Any, number: int, answer: list[int]) -> float:
    """How far the target's two best log-probabilities are apart after a question and these answer tokens."""
    from vllm import SamplingParams

    prompt = render(llm.get_tokenizer(), [{"role": "user", "content": QUESTIONS[number]}])
    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=2)
    (out,) = llm.generate([{"prompt_token_ids": [*prompt, *answer]}], sampling, use_tqdm=False)
    best, second = sorted((entry.logprob for entry in out.outputs[0].logprobs[0].values()), reverse=True)[:2]
    return best - second


TASKS = {"chat": chat, "gap": gap}
