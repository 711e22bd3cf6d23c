"""What tuning asks of an engine in a process of its own.

``step`` times decoding steps, ``acceptance`` counts accepted drafts by position, ``throughput`` times a steady load.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

from vllm_gumiho.engines.counters import Counts, read_counts
from vllm_gumiho.engines.prompts import question_ids
from vllm_gumiho.engines.stream import Stream
from vllm_gumiho.errors import TuningError

WARM_STEPS = 3
WAVES = 3
GOLDEN_RATIO = (5**0.5 - 1) / 2
WAIT_S = 300


def acceptance(llm: Any, tokens: int) -> dict[str, Any]:
    """Greedy answers of ``tokens`` tokens.  Drafts made, and how many had position 1, 2, ... accepted."""
    from vllm import SamplingParams

    before = read_counts(llm.get_metrics())
    sampling = SamplingParams(temperature=0, max_tokens=tokens)
    asked = [{"prompt_token_ids": ids} for ids in question_ids(llm.get_tokenizer())]
    llm.generate(asked, sampling, use_tqdm=False)
    counts = read_counts(llm.get_metrics()) - before
    return {"drafts": counts.drafts, "accepted": list(counts.accepted_per_position)}


def step(llm: Any, batch: int, length: int, switch: bool, seconds: float) -> float:
    """Median milliseconds of a decoding step of ``batch`` requests.

    length: K; with ``switch`` the engine is set to it, otherwise it was started with it.

    Raises: TuningError when the engine drafts another length.
    """
    if switch:
        set_draft_length(llm, length)
    before = read_counts(llm.get_metrics())
    found = step_ms(llm.llm_engine, question_ids(llm.get_tokenizer()), batch, seconds)
    check_length(read_counts(llm.get_metrics()) - before, length)
    return found


def set_draft_length(llm: Any, length: int) -> None:
    """Draft ``length`` tokens for any batch size from the next step on, by the scheduler's own table."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    scheduler.dynamic_sd_lookup = [length] * len(scheduler.dynamic_sd_lookup)


def step_ms(engine: Any, prompts: list[list[int]], batch: int, seconds: float) -> float:
    """Median milliseconds of a step in which all of ``batch`` requests decode, over at least five steps.

    Raises: TuningError when the engine cannot hold so many requests at once.
    """
    from vllm import SamplingParams

    stream = Stream(engine)
    sampling = SamplingParams(temperature=0, max_tokens=100_000, ignore_eos=True, detokenize=False)
    for number in range(batch):
        stream.send(number, prompts[number % len(prompts)], sampling)
    times: list[float] = []
    decoding, begun = 0, time.perf_counter()
    while len(times) < 5 or (len(times) < 50 and sum(times) < seconds):
        start = time.perf_counter()
        outputs = stream.step()
        took = time.perf_counter() - start
        if any(output.finished for _, output in outputs):
            break
        decoding = decoding + 1 if len(outputs) == batch else 0
        if decoding > WARM_STEPS:
            times.append(took)
        if not times and time.perf_counter() - begun > WAIT_S:
            break
    stream.abort()
    if not times:
        raise TuningError(f"{batch} requests never decoded together; lower --concurrency, or give the KV cache room")
    return 1000 * statistics.median(times)


def throughput(llm: Any, batch: int, tokens: int) -> float:
    """Output tokens/s while ``batch`` greedy requests run, each followed by the next; prompts are part of the time.

    `WAVES` times ``batch`` requests in all, and every prompt at least once; the clock stops when one ends that none
    follows.  Answers have half to one and a half times ``tokens`` tokens: requests that all start and end together
    would favour engines without speculation, where each gets a token a step.
    """
    from vllm import SamplingParams

    prompts, stream = question_ids(llm.get_tokenizer()), Stream(llm.llm_engine)
    written: dict[int, int] = {}
    waiting = iter(range(max(WAVES * batch, len(prompts))))

    def send(number: int) -> None:
        length = max(1, round(tokens * (0.5 + (number + 0.5) * GOLDEN_RATIO % 1)))
        sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        stream.send(number, prompts[number % len(prompts)], sampling)
        written[number] = 0

    start = time.perf_counter()
    for number in itertools.islice(waiting, batch):
        send(number)
    steady = True
    while steady:
        for number, output in stream.step():
            written[number] = len(output.outputs[0].token_ids)
            if output.finished:
                following = next(waiting, None)
                steady = steady and following is not None
                if following is not None:
                    send(following)
    found = sum(written.values()) / (time.perf_counter() - start)
    stream.drain()
    return found


def check_length(counts: Counts, length: int) -> None:
    """Raises: TuningError where the engine drafted another number of tokens than ``length``."""
    found = counts.draft_tokens / counts.drafts if counts.drafts else 0
    if abs(found - length) > 0.5:
        raise TuningError(f"the engine drafted {found:.2f} tokens a step where {length} were set; give a K yourself")


TASKS = {"step": step, "acceptance": acceptance, "throughput": throughput}
