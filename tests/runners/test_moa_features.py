"""Features with Mixture of Attentions: the same tokens as with speculation off, and every draft by the equations.

`engines.run` holds the drafts.  Each request form that a row names is in one step; Gumiho's own tests go deeper.
"""

from __future__ import annotations

import predictable
import pytest
from engines import assert_same, assert_same_beginnings, cut_tokens, generate, greedy, pair, run, step, tokens
from predictable import EOS, VOCAB, encode

pytestmark = pytest.mark.engine
PROMPTS = ["The quick brown", "12 ", "abc", "{}[]!"]
TO_EOS = ["uv", "u", "vwx", "pqrstuvw"]
LENGTHS = list(range(1, 10))
BLOCK, LONGEST, CHUNK = 32, 160, 48
SCHEDULE = [[1, 2, 5], [3, 4, 2]]
REGEX = "[a-z]{4,12}-[0-9]{3,9}"
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 1.5, "frequency_penalty": 0.9}


def prompt(length: int, start: int = 0) -> list[int]:
    """A prompt of text that no other start shares a block with."""
    return [2 + (start * 31 + i * 7 + i // 5) % (VOCAB - 2) for i in range(length)]


SHARED = prompt(3 * BLOCK)
AT_THE_END = [prompt(LONGEST - left, left) for left in (1, 5, 9, 30)]


def request_steps() -> dict[str, dict]:
    seeded = {"temperature": 1.0, "seed": 11, "max_tokens": 10, "ignore_eos": True}
    return {
        "stops": generate(PROMPTS, greedy(stop=["STU", "tu", "01", "./"])),
        "stop token": generate(PROMPTS, greedy(stop_token_ids=encode("tU3"))),
        "eos": generate(TO_EOS, greedy(ignore_eos=False)),
        "min_tokens": generate(TO_EOS, greedy(ignore_eos=False, min_tokens=16)),
        "max_tokens": generate(["0123"] * len(LENGTHS), [greedy(length) for length in LENGTHS]),
        "logprobs": generate(PROMPTS, greedy(12, logprobs=3)),
        "prompt_logprobs": generate(PROMPTS, greedy(8, prompt_logprobs=3)),
        "penalties": generate(PROMPTS, [greedy(20, **{name: value}) for name, value in (*PENALTIES.items(), ("n", 1))]),
        "bad words": generate(PROMPTS, greedy(bad_words=["rst", "S", "(*", "78"])),
        "allowed tokens": generate(PROMPTS, greedy(allowed_token_ids=encode("abcdefgh0123456789"))),
        "n": generate(PROMPTS, greedy(12, n=3, temperature=1.0, top_k=1)),
        "structured": generate(["abc", "12 "], greedy(40, ignore_eos=False, structured_outputs={"regex": REGEX})),
        "seed": generate(PROMPTS, seeded),
        "seed again": generate(PROMPTS, seeded),
        "other seed": generate(PROMPTS, seeded | {"seed": 12}),
    }


def scheduling_steps() -> dict[str, dict]:
    return {
        "chunked": generate([prompt(n, n) for n in (5, 120, CHUNK, CHUNK + 1, 90)], greedy(16)),
        "first": generate([SHARED + prompt(9, 40)], greedy(12)),
        "hit": generate([SHARED + prompt(9, 40)], greedy(12)),
        "up to the end": generate(AT_THE_END, greedy(64)),
        "traffic": {
            "do": "traffic",
            "prompts": [prompt(length, length) for length in (3, 20, 7, 60)],
            "sampling": greedy(24),
            "join": [0, 0, 3, 5],
            "abort": [None, 6, None, 3],
        },
        "preemption": generate([prompt(2 * BLOCK, start) for start in range(50, 54)], greedy(80)),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moa")
    target = predictable.write_target(folder / "target")
    models = target, predictable.write_moa(folder / "moa", noise=0.1)
    settings = {"structured_outputs_config": {"backend": "xgrammar"}}
    moa = {"method": "moa", "num_speculative_tokens": 5}
    cases = pair(*models, request_steps(), **settings, speculative=moa)
    # Few blocks, so that four long requests do not fit.
    scheduling = {"max_model_len": LONGEST, "block_size": BLOCK, "max_num_seqs": 4, "max_num_batched_tokens": CHUNK}
    scheduling |= {"num_gpu_blocks_override": 14, "speculative": moa}
    cases |= pair(*models, scheduling_steps(), "scheduling", **scheduling)
    by_batch = moa | {"num_speculative_tokens_per_batch_size": SCHEDULE}
    batch = {"batch": generate(PROMPTS, [greedy(length) for length in (8, 16, 24, 24)])}
    cases["schedule"] = pair(*models, batch, speculative=by_batch, max_num_seqs=4)["on"]
    cases["fixed"] = pair(*models, batch, speculative=moa, max_num_seqs=4)["on"]
    # Last: from here on the process takes async_scheduling as asked for.
    chunked = {name: scheduling_steps()[name] for name in ("chunked", "up to the end")}
    cases["async"] = pair(*models, chunked, **scheduling, async_scheduling=True)["on"]
    return run(folder, cases)


def test_the_drafter_is_moa_and_every_draft_is_held_to_the_equations(results):
    assert results["on"]["facts"]["draft"] == ["Eagle3MoaForCausalLM"]
    for name in ("on", "scheduling on", "schedule", "async"):
        found = results[name]["facts"]["drafts"]
        assert found["compared"] > 50
        assert found["wrong"] == []


@pytest.mark.feature("stop strings and stop tokens", "V1", "moa")
@pytest.mark.parametrize("name", ["stops", "stop token"])
def test_stops(results, name):
    on = assert_same(results, name)
    assert "stop" in [output["finish"][0] for output in on["result"]]


@pytest.mark.feature("end of sequence inside a draft", "V1", "moa")
@pytest.mark.feature("min_tokens", "V1", "moa")
def test_ends_of_sequence(results):
    on = assert_same(results, "eos")
    assert sum(output["tokens"][0][-1] == EOS for output in on["result"]) >= 2
    assert cut_tokens(on) > 0, "no end of sequence fell inside a draft"
    assert all(len(ids[0]) >= 16 for ids in tokens(assert_same(results, "min_tokens")))


@pytest.mark.feature("max_tokens reached inside a draft", "V1", "moa")
def test_max_tokens_inside_a_draft(results):
    on = assert_same(results, "max_tokens", rejected=False)
    assert [len(ids[0]) for ids in tokens(on)] == LENGTHS
    assert cut_tokens(on) > 0


@pytest.mark.feature("logprobs", "V1", "moa")
@pytest.mark.feature("prompt_logprobs", "V1", "moa")
@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_logprobs(results, name):
    on = assert_same(results, name)
    for a, b in zip(step(results, "off", name)["result"], on["result"], strict=True):
        mine, theirs = (x[name][0] if name == "logprobs" else x[name][1:] for x in (b, a))
        for one, other in zip(mine, theirs, strict=True):
            assert one == pytest.approx(other, abs=1e-3)


@pytest.mark.feature("repetition, presence and frequency penalties", "V1", "moa")
@pytest.mark.feature("bad words", "V1", "moa")
@pytest.mark.feature("allowed tokens", "V1", "moa")
@pytest.mark.feature("n > 1", "V1", "moa")
@pytest.mark.feature("structured output: JSON schema, regex, grammar, choice", "V1", "moa")
@pytest.mark.parametrize("name", ["penalties", "bad words", "allowed tokens", "n", "structured"])
def test_what_changes_the_target_changes_the_text_alike(results, name):
    assert_same(results, name)


@pytest.mark.feature("per-request seeds", "V1", "moa")
def test_a_seed_fixes_what_is_drawn(results):
    first = tokens(step(results, "on", "seed"))
    assert tokens(step(results, "on", "seed again")) == first
    assert tokens(step(results, "on", "other seed")) != first
    assert step(results, "on", "seed")["counts"]["accepted"] > 0


@pytest.mark.feature("chunked prefill", "V1", "moa")
@pytest.mark.feature("prompts and outputs up to max_model_len", "V1", "moa")
@pytest.mark.feature("async scheduling", "V1", "moa")
@pytest.mark.parametrize("on", ["scheduling on", "async"])
@pytest.mark.parametrize("name", ["chunked", "up to the end"])
def test_long_texts(results, name, on):
    found = assert_same(results, name, on, "scheduling off")
    assert results["async"]["facts"]["async_scheduling"]
    if name == "up to the end":
        lengths = [len(p) + len(output["tokens"][0]) for p, output in zip(AT_THE_END, found["result"], strict=True)]
        assert lengths == [LONGEST] * len(AT_THE_END)


@pytest.mark.feature("prefix caching", "V1", "moa")
@pytest.mark.feature("preemption and recompute", "V1", "moa")
def test_caches(results):
    # Two or three drafts of one request: none of them need be wrong.
    assert_same(results, "first", "scheduling on", "scheduling off", rejected=False)
    hit = assert_same(results, "hit", "scheduling on", "scheduling off", rejected=False)
    assert hit["counts"]["prefix_hits"] > 0
    assert assert_same(results, "preemption", "scheduling on", "scheduling off")["counts"]["preemptions"] > 0


@pytest.mark.feature("requests joining, finishing and aborted", "V1", "moa")
def test_requests_come_and_go_in_mid_draft(results):
    off, on = step(results, "scheduling off", "traffic"), step(results, "scheduling on", "traffic")
    assert sorted(on["result"]["aborted"]) == [1, 3]
    assert_same_beginnings(off, on)
    assert on["result"]["cache_usage"] == 0


@pytest.mark.feature("greedy requests: continuous batching, every K, K by batch size", "V1", "moa")
def test_a_schedule_drafts_fewer_tokens_in_larger_batches(results):
    scheduled, fixed = step(results, "schedule", "batch"), step(results, "fixed", "batch")
    assert tokens(scheduled) == tokens(fixed)
    assert fixed["counts"]["drafted"] == 5 * fixed["counts"]["drafts"]
    assert 2 * scheduled["counts"]["drafts"] < scheduled["counts"]["drafted"] < 5 * scheduled["counts"]["drafts"]
