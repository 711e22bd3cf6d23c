"""What is drafted after some text does not depend on how its KV came to be: in chunks, from the prefix cache, anew.

The drafter's layers are random, so that each draft hangs on its whole KV cache: a wrong entry would cost acceptance
and never show in the text.  Runner V1.
"""

from __future__ import annotations

import pytest
import tiny
from features import generate, greedy, pair, run, step

pytestmark = pytest.mark.engine
# Room beyond every request: V1 drafts zeros for a whole batch once one comes within K of the end.
BLOCK, LONGEST = 32, 256
PROMPTS = [
    [2 + (start * 31 + i * 7 + i // 5) % (tiny.VOCAB - 2) for i in range(n)] for start, n in enumerate((97, 70, 40))
]
SAMPLING = greedy(24, detokenize=False)
STEPS = {"first": generate(PROMPTS, SAMPLING)}
AGAIN = {**STEPS, "hit": generate(PROMPTS[:2], SAMPLING), "beside others": generate(PROMPTS[::-1], SAMPLING)}


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_target, tiny_checkpoint):
    alone = {"max_num_seqs": 1, "enable_prefix_caching": False, "max_num_batched_tokens": 256}
    chunks = {"max_num_seqs": 4, "block_size": BLOCK, "max_num_batched_tokens": 48, "enable_prefix_caching": True}
    few = chunks | {"num_gpu_blocks_override": 9, "max_num_seqs": 3}
    settings = {"alone": (alone, STEPS), "chunks": (chunks, AGAIN), "few": (few, STEPS)}
    cases = {
        name: pair(tiny_target, tiny_checkpoint, steps, max_model_len=LONGEST, skip_tokenizer_init=True, **llm)["on"]
        | {"record": True}
        for name, (llm, steps) in settings.items()
    }
    return run(tmp_path_factory.mktemp("drafts"), cases)


def drafts(results: dict, case: str) -> dict[tuple[int, ...], set[tuple[int, ...]]]:
    found: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for text, drafted in results[case]["drafts"]:
        found.setdefault(tuple(text), set()).add(tuple(drafted))
    return found


@pytest.mark.parametrize("case", ["chunks", "few"])
def test_drafts_are_those_of_a_request_that_ran_alone(results, case):
    wanted, found = drafts(results, "alone"), drafts(results, case)
    assert all(len(drafted) == 1 for drafted in wanted.values())
    assert len({drafted for each in wanted.values() for drafted in each}) > 20, "drafts hardly differ"
    assert wanted.keys() <= found.keys()
    for text, drafted in wanted.items():
        assert found[text] == drafted, f"after {len(text)} tokens"


def test_the_cases_were_what_they_say(results):
    assert step(results, "chunks", "hit")["counts"]["prefix_hits"] > 0
    assert step(results, "few", "first")["counts"]["preemptions"] > 0
