"""A measuring engine in a process of its own: ``python -m vllm_gumiho.tuning.worker FOLDER``.

FOLDER/llm.json holds the arguments of `vllm.LLM`.  Requests are JSON lines on standard input, ``{"do": name, ...}``;
each gets one JSON line in FOLDER/replies, the first of which says what was started.  ``step`` times decoding steps,
``acceptance`` counts accepted drafts by position, ``throughput`` times a steady load.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_gumiho.demo import PROMPTS
from vllm_gumiho.tuning import TuningError

WARM_STEPS = 3
WAVES = 3
GOLDEN_RATIO = (5**0.5 - 1) / 2


def main() -> None:
    """Serve requests until standard input ends; a failure is the last reply, as ``error``."""
    folder = Path(sys.argv[1])
    with (folder / "replies").open("a", buffering=1) as replies:
        try:
            serve(json.loads((folder / "llm.json").read_text()), replies)
        except Exception as error:
            replies.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
            raise


def serve(settings: dict[str, Any], replies: Any) -> None:
    """Start the engine, then answer requests."""
    from vllm import LLM

    llm = LLM(**settings)
    config = llm.llm_engine.vllm_config
    speculative = config.speculative_config
    started = {
        "runner": "V2" if config.use_v2_model_runner else "V1",
        "draft_length": speculative.num_speculative_tokens if speculative else 0,
    }
    prompts = chat_prompts(llm)
    replies.write(json.dumps(started) + "\n")
    parts: dict[str, Callable[..., Any]] = {"step": step, "acceptance": acceptance, "throughput": throughput}
    for line in sys.stdin:
        request = json.loads(line)
        replies.write(json.dumps(parts[request.pop("do")](llm, prompts, **request)) + "\n")
    llm.llm_engine.engine_core.shutdown()


def chat_prompts(llm: Any) -> list[list[int]]:
    """The demonstration's questions as token ids, in the target's chat format where it has one."""
    tokenizer = llm.get_tokenizer()
    if not getattr(tokenizer, "chat_template", None):
        return [list(tokenizer.encode(prompt)) for prompt in PROMPTS]
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return [list(tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False)) for c in chats]


def acceptance(llm: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Greedy answers of ``tokens`` tokens.  Drafts made, and how many had position 1, 2, ... accepted."""
    from vllm import SamplingParams

    before, kept = _counts(llm)
    sampling = SamplingParams(temperature=0, max_tokens=tokens)
    llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    drafts, accepted = _counts(llm)
    return {"drafts": drafts - before, "accepted": [a - b for a, b in zip(accepted, kept, strict=True)]}


def step(llm: Any, prompts: list[list[int]], batch: int, length: int, switch: bool, seconds: float) -> float:
    """Median milliseconds of a decoding step of ``batch`` requests.

    length: K; with ``switch`` the engine is set to it, otherwise it was started with it.

    Raises: TuningError when the engine drafts another length.
    """
    if switch:
        set_draft_length(llm, length)
    before = _drafted(llm)
    found = step_ms(llm.llm_engine, prompts, batch, seconds)
    _check_length(before, _drafted(llm), length)
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

    sampling = SamplingParams(temperature=0, max_tokens=100_000, ignore_eos=True, detokenize=False)
    names = [f"{batch}-{number}-{time.monotonic_ns()}" for number in range(batch)]
    for number, name in enumerate(names):
        engine.add_request(name, {"prompt_token_ids": prompts[number % len(prompts)]}, sampling)
    times: list[float] = []
    decoding, begun = 0, time.perf_counter()
    while len(times) < 5 or (len(times) < 50 and sum(times) < seconds):
        start = time.perf_counter()
        outputs = engine.step()
        took = time.perf_counter() - start
        if any(output.finished for output in outputs):
            break
        decoding = decoding + 1 if len(outputs) == batch else 0
        if decoding > WARM_STEPS:
            times.append(took)
        if not times and time.perf_counter() - begun > 300:
            break
    engine.abort_request(names)
    if not times:
        raise TuningError(f"{batch} requests never decoded together; lower --max-batch or give the KV cache more room")
    return 1000 * statistics.median(times)


def throughput(llm: Any, prompts: list[list[int]], batch: int, tokens: int) -> float:
    """Output tokens/s while ``batch`` greedy requests run, each followed by the next; prompts are part of the time.

    `WAVES` times ``batch`` requests in all, and every prompt at least once; the clock stops when one ends that none
    follows.  Answers have half to one and a half times ``tokens`` tokens: requests that all start and end together
    would favour engines without speculation, where each gets a token a step.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    written: dict[str, int] = {}
    waiting = iter(range(max(WAVES * batch, len(prompts))))

    def send(number: int) -> None:
        name = f"{number}-{time.monotonic_ns()}"
        length = max(1, round(tokens * (0.5 + (number + 0.5) * GOLDEN_RATIO % 1)))
        sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        engine.add_request(name, {"prompt_token_ids": prompts[number % len(prompts)]}, sampling)
        written[name] = 0

    start = time.perf_counter()
    for number in itertools.islice(waiting, batch):
        send(number)
    steady = True
    while steady:
        for output in engine.step():
            written[output.request_id] = len(output.outputs[0].token_ids)
            if output.finished:
                following = next(waiting, None)
                steady = steady and following is not None
                if following is not None:
                    send(following)
    found = sum(written.values()) / (time.perf_counter() - start)
    while engine.has_unfinished_requests():
        engine.step()
    return found


def _counts(llm: Any) -> tuple[int, list[int]]:
    drafts, accepted = 0, []
    for metric in llm.get_metrics():
        if metric.name == "vllm:spec_decode_num_drafts":
            drafts = metric.value
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            accepted = list(metric.values)
    return drafts, accepted


def _drafted(llm: Any) -> tuple[float, float]:
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return values.get("vllm:spec_decode_num_drafts", 0), values.get("vllm:spec_decode_num_draft_tokens", 0)


def _check_length(before: tuple[float, float], after: tuple[float, float], length: int) -> None:
    drafts, tokens = after[0] - before[0], after[1] - before[1]
    found = tokens / drafts if drafts else 0
    if abs(found - length) > 0.5:
        raise TuningError(f"the engine drafted {found:.2f} tokens a step where {length} were set; give a K yourself")


if __name__ == "__main__":
    main()
