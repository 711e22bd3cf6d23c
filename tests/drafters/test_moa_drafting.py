"""What the engine drafts with Mixture of Attentions is what its equations draft, step by step, in both model runners.

The drafter is random, so that each draft hangs on every feature and token before it; the target's states come from
another implementation of the target.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import tiny_moa
import torch
from engines import CORES, GREEDY, UNEQUAL_PROMPTS, case, generate, greedy, run, step, tokens
from tiny_moa import Wanted

pytestmark = pytest.mark.engine
LENGTHS = (1, 3, 7)
BLOCK = 32
LONG = [
    [2 + (start * 31 + i * 7 + i // 5) % (tiny.VOCAB - 2) for i in range(n)] for start, n in enumerate((97, 70, 40))
]
CHUNKS = {"max_num_seqs": 4, "block_size": BLOCK, "max_num_batched_tokens": 48, "enable_prefix_caching": True}
# Enough tokens for the second and third request of a full cache to ask for another block.
FEW = CHUNKS | {"num_gpu_blocks_override": 9, "max_num_seqs": 3}
TOKENS = 27
# float32 sums in another order, after two layers and a layer attention of random weights.
TOLERANCE = 1e-4


def moa(checkpoint: Path, **more) -> dict:
    return {"method": "moa", "model": str(checkpoint), **more}


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return tiny.write_target(tmp_path_factory.mktemp("target"), num_hidden_layers=tiny_moa.TARGET_LAYERS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, target) -> Path:
    return tiny_moa.write(tmp_path_factory.mktemp("moa"), str(target))


def recorded(target: Path, checkpoint: Path, steps: dict[str, dict], length: int, **llm) -> dict:
    speculative = moa(checkpoint, num_speculative_tokens=length)
    settings = {"model": str(target), "skip_tokenizer_init": True, "speculative_config": speculative, **llm}
    return {"llm": settings, "steps": steps, "record features": True}


@pytest.fixture(scope="module", params=["v1", "v2"])
def results(request, tmp_path_factory, target, checkpoint):
    runner = request.param
    plain = {"plain": generate(UNEQUAL_PROMPTS, GREEDY | {"detokenize": False, "max_tokens": 10})}
    long = {"long": generate(LONG, greedy(TOKENS, detokenize=False))}
    again = long | {"hit": generate(LONG[:2], greedy(6, detokenize=False))}
    cases = {"off": case(target, None, [{"prompts": UNEQUAL_PROMPTS, "sampling": plain["plain"]["sampling"]}])}
    cases["off"]["steps"]["1"] = long["long"]
    cases |= {f"k{length}": recorded(target, checkpoint, plain, length) for length in LENGTHS}
    cases["chunks"] = recorded(target, checkpoint, again, 3, **CHUNKS)
    cases["few"] = recorded(target, checkpoint, long, 7, **FEW)
    found = run(tmp_path_factory.mktemp(runner), cases, runner)
    assert found["k7"]["facts"]["runner"] == runner
    return found


@pytest.fixture(scope="module")
def workers(tmp_path_factory, target, checkpoint):
    """Runner V1: in V2 each of two workers would need the interpreter."""
    # An odd number of tokens, so many that the ranks share out the features of most steps.
    more = CHUNKS | {"max_num_batched_tokens": 81, "tensor_parallel_size": 2}
    cases = {
        "workers": recorded(target, checkpoint, {"long": generate(LONG, greedy(TOKENS, detokenize=False))}, 3, **more)
    }
    cases["off"] = case(target, None, [{"prompts": LONG, "sampling": greedy(TOKENS)}])
    return run(tmp_path_factory.mktemp("workers"), cases, env=CORES)


@pytest.fixture(scope="module")
def wanted(target, checkpoint) -> Wanted:
    return Wanted(tiny_moa.reference(target, checkpoint), tiny_moa.TargetStates(target))


CASES = [*(f"k{length}" for length in reversed(LENGTHS)), "chunks", "few"]


def assert_drafts(found: dict, wanted: Wanted, with_features: bool = True) -> None:
    """Of a case: tokens and what they come from are those of the equations."""
    assert "error" not in found, found.get("error")
    drafts, features = found["drafts"], found["draft features"]
    assert len({tuple(drafted) for _, drafted in drafts}) > 20, "drafts hardly differ"
    assert bool(features) == with_features
    for number, (text, drafted) in enumerate(drafts):
        ids, hidden = wanted.after(text, len(drafted))
        assert drafted == ids, f"after {len(text)} tokens"
        if features:
            torch.testing.assert_close(torch.tensor(features[number]), hidden, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_drafts_and_features_are_those_of_the_equations(results, wanted, name):
    assert_drafts(results[name], wanted)


@pytest.mark.feature("greedy requests: continuous batching, every K, K by batch size", "V1", "moa")
@pytest.mark.feature("greedy requests: continuous batching, every K, K by batch size", "V2", "moa")
@pytest.mark.feature("chunked prefill", "V1", "moa")
@pytest.mark.feature("chunked prefill", "V2", "moa")
@pytest.mark.feature("prefix caching", "V1", "moa")
@pytest.mark.feature("prefix caching", "V2", "moa")
@pytest.mark.feature("preemption and recompute", "V1", "moa")
@pytest.mark.feature("preemption and recompute", "V2", "moa")
@pytest.mark.parametrize("name", CASES)
def test_greedy_text_is_the_targets_own(results, name):
    on = "plain" if name.startswith("k") else "long"
    wanted = tokens(step(results, "off", "0" if on == "plain" else "1"))
    assert tokens(step(results, name, on)) == wanted
    if name == "chunks":
        assert tokens(step(results, name, "hit")) == [[ids[:6]] for (ids,) in wanted[:2]]


@pytest.mark.feature("tensor parallel", "V1", "moa")
def test_two_workers_draft_the_same(workers, wanted):
    assert_drafts(workers["workers"], wanted, with_features=False)
    assert tokens(step(workers, "workers", "long")) == tokens(step(workers, "off", "0"))


def test_the_cases_were_what_they_say(results):
    assert step(results, "chunks", "hit")["counts"]["prefix_hits"] > 0
    assert step(results, "few", "long")["counts"]["preemptions"] > 0
    for length in LENGTHS:
        counts = step(results, f"k{length}", "plain")["counts"]
        assert counts["drafted"] == length * counts["drafts"] > 0


@pytest.mark.parametrize("fault", ["features of drafted tokens are seen", "drafted tokens are not seen"])
def test_what_a_wrong_attention_drafts_is_not_what_the_equations_draft(tmp_path, target, checkpoint, wanted, fault):
    """The two ways to get it wrong, planted: the comparison above would find each."""
    steps = {"plain": generate(UNEQUAL_PROMPTS[:1], greedy(6, detokenize=False))}
    cases = {fault: recorded(target, checkpoint, steps, 3) | {"plant": fault, "not compared": True}}
    drafts = run(tmp_path, cases)[fault]["drafts"]
    pairs = [(drafted, wanted.after(text, 3)[0]) for text, drafted in drafts]
    assert all(found[0] == right[0] for found, right in pairs), "the first token sees no drafted one"
    assert any(found != right for found, right in pairs)
