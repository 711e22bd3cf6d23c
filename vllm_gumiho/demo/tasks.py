"""What the demonstration asks of an engine in a process of its own."""

from __future__ import annotations

import time
from typing import Any

from vllm_gumiho.engines.counters import read_counts
from vllm_gumiho.engines.prompts import QUESTIONS, render
from vllm_gumiho.engines.stream import Stream
from vllm_gumiho.engines.worker import start_engine


class Chat:
    """An engine, the questions it has been asked, and how far their answers are."""

    def __init__(self, llm: Any):
        self.llm = llm
        self.stream = Stream(llm.llm_engine)
        self.before = read_counts(llm.get_metrics())
        self._clear()

    def _clear(self) -> None:
        self.texts: dict[int, str] = {}
        self.tokens: dict[int, list[int]] = {}
        self.seconds, self.passes = 0.0, 0

    def begin(self, numbers: list[int], max_tokens: int) -> None:
        """Ask these of the built-in questions at once, each for a greedy answer."""
        from vllm import SamplingParams

        self._clear()
        tokenizer, sampling = self.llm.get_tokenizer(), SamplingParams(temperature=0, max_tokens=max_tokens)
        for number in numbers:
            self.stream.send(number, render(tokenizer, [{"role": "user", "content": QUESTIONS[number]}]), sampling)

    def advance(self, seconds: float) -> dict[str, Any]:
        """Go on for about so long: ``texts`` and ``tokens`` by question so far, and the ``seconds`` they took.

        passes: of the target that gave a question tokens, each question's counted.
        """
        begun = now = time.perf_counter()
        while len(self.stream) and now - begun < seconds:
            for number, output in self.stream.step():
                self.passes += 1
                self.texts[number] = output.outputs[0].text
                self.tokens[number] = list(output.outputs[0].token_ids)
            now = time.perf_counter()
        self.seconds += now - begun
        return {
            "texts": {str(number): text for number, text in self.texts.items()},
            "tokens": {str(number): tokens for number, tokens in self.tokens.items()},
            "seconds": self.seconds,
            "passes": self.passes,
            "left": len(self.stream),
        }

    def counts(self) -> dict[str, Any]:
        """What was counted since the last call."""
        now = read_counts(self.llm.get_metrics())
        found, self.before = now - self.before, now
        return vars(found)

    def gap(self, number: int, answer: list[int]) -> float:
        """How far the target's two best log-probabilities are apart after a question and these answer tokens."""
        from vllm import SamplingParams

        prompt = render(self.llm.get_tokenizer(), [{"role": "user", "content": QUESTIONS[number]}])
        sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=2)
        (out,) = self.llm.generate([{"prompt_token_ids": [*prompt, *answer]}], sampling, use_tqdm=False)
        best, second = sorted((entry.logprob for entry in out.outputs[0].logprobs[0].values()), reverse=True)[:2]
        return best - second

    @property
    def llm_engine(self) -> Any:
        """For the worker, which shuts it down."""
        return self.llm.llm_engine


def start(job: dict[str, Any]) -> tuple[Chat, dict[str, Any]]:
    """An engine that has answered once, so that nothing is made for the first time later."""
    llm, facts = start_engine(job)
    chat = Chat(llm)
    chat.begin([0], 8)
    chat.advance(600)
    chat.counts()
    return chat, facts


TASKS = {"begin": Chat.begin, "advance": Chat.advance, "counts": Chat.counts, "gap": Chat.gap}
