"""What is drafted after some text does not depend on how its KV came to be: in chunks, from the prefix cache, anew.

The drafter's layers are random, so that each draft hangs on its whole KV cache: a wrong entry would cost acceptance
and never show in the text.
"""

from __future__ import annotations

import pytest
import tiny
from engines import CORES, generate, greedy, pair, run, step

pytestmark = [pytest.mark.engine, pytest.mark.next_release]
# Room beyond every request: V1 drafts zeros for a whole batch once one comes within K of the end.
BLOCK, LONGEST = 32, 256
PROMPTS = [
    [2 + (start * 31 + i * 7 + i // 5) % (tiny.VOCAB - 2) for i in range(n)] for start, n in enumerate((97, 70, 40))
]
# Parts from the first prompt right behind a block, of whose last entry the first prompt's own next token is a part.
BRANCH = [*PROMPTS[0][: 2 * BLOCK], 5 + PROMPTS[0][2 * BLOCK], *PROMPTS[2][:6]]
# Enough for the second and third request of a full cache to ask for another block; V2 runs under the interpreter.
TOKENS = {"v1": 24, "v2": 27}
ALONE = {"max_num_seqs": 1, "enable_prefix_caching": False, "max_num_batched_tokens": 256}
CHUNKS = {"max_num_seqs": 4, "block_size": BLOCK, "max_num_batched_tokens": 48, "enable_prefix_caching": True}
FEW = CHUNKS | {"num_gpu_blocks_override": 9, "max_num_seqs": 3}


@pytest.fixture(scope="module", params=TOKENS)
def results(request, tmp_path_factory, tiny_target, tiny_checkpoint):
    runner = request.param
    sampling = greedy(TOKENS[runner], detokenize=False)
    first = {"first": generate(PROMPTS, sampling)}
    branch = {"branch": generate([BRANCH], greedy(4, detokenize=False))}
    again = first | {"hit": generate(PROMPTS[:2], sampling)} | branch
    if runner == "v1":
        again |= {"beside others": generate(PROMPTS[::-1], sampling)}

    def recorded(steps: dict[str, dict], **llm) -> dict:
        return pair(tiny_target, tiny_checkpoint, steps, max_model_len=LONGEST, skip_tokenizer_init=True, **llm)["on"]

    cases = {
        "alone": recorded(first | branch, **ALONE),
        "chunks": recorded(again, **CHUNKS),
        "few": recorded(first, **FEW),
    }
    found = run(tmp_path_factory.mktemp("drafts"), cases, runner)
    if runner == "v1":
        workers = {"workers": recorded(first, **CHUNKS, tensor_parallel_size=2)}
        found |= run(tmp_path_factory.mktemp("workers"), workers, env=CORES | {"VLLM_GUMIHO_SPLIT_HEADS": "1"})
    assert found["alone"]["facts"]["runner"] == runner
    return found


def drafts(results: dict, case: str) -> dict[tuple[int, ...], set[tuple[int, ...]]]:
    found: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for text, drafted in results[case]["drafts"]:
        found.setdefault(tuple(text), set()).add(tuple(drafted))
    return found


def test_drafts_are_those_of_a_request_that_ran_alone(results):
    wanted = drafts(results, "alone")
    assert all(len(drafted) == 1 for drafted in wanted.values())
    assert len({drafted for each in wanted.values() for drafted in each}) > 20, "drafts hardly differ"
    for case in results.keys() - {"alone"}:
        found = drafts(results, case)
        branched = {text for text in wanted if list(text[: len(BRANCH)]) == BRANCH}
        assert len(branched) > 1
        expected = wanted.keys() if "branch" in results[case]["steps"] else wanted.keys() - branched
        # Workers elsewhere hand none over for a request that has ended.
        both = wanted.keys() & found.keys()
        assert len(both) > 20 if case == "workers" else both == expected, case
        for text in both:
            assert found[text] == wanted[text], f"{case}, after {len(text)} tokens"


def test_the_cases_were_what_they_say(results):
    assert step(results, "chunks", "hit")["counts"]["prefix_hits"] > 0
    assert step(results, "chunks", "branch")["counts"]["prefix_hits"] == BLOCK
    assert step(results, "few", "first")["counts"]["preemptions"] > 0
