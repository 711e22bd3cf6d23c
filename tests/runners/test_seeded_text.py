"""``seeded_text: "same"``: a seeded request gives the tokens that it gives without speculation, in runner V2.

The engines run under Triton's interpreter.  The long form asks it of 200 seeds a setting.
"""

from __future__ import annotations

import math
import re

import predictable
import pytest
from engines import assert_same_beginnings, cut_tokens, generate, pair, run, step, tokens
from predictable import encode

pytestmark = pytest.mark.engine
SAME = {"seeded_text": "same"}
CHUNK, BLOCK, LONGEST = 48, 32, 48
LONG_PROMPT = [2 + (i * 7 + i // 5) % (predictable.VOCAB - 2) for i in range(70)]
REGEX = "[a-z]{4,8}-[0-9]{3}"
REQUESTS = {
    "T=1": (encode("abc"), {}),
    "T=0.7": (encode("xyz"), {"temperature": 0.7}),
    "top-p": (encode("12 "), {"top_p": 0.8}),
    "top-k": (encode("ABC"), {"top_k": 4}),
    "both": (encode("hij"), {"temperature": 0.7, "top_k": 20, "top_p": 0.9}),
    "greedy": (encode("abc"), {"temperature": 0.0}),
    "long": (LONG_PROMPT, {}),
    "logprobs": (encode("abc"), {"logprobs": 3}),
    "penalties": (encode("{}[]!"), {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5}),
    "bad words": (encode("12 "), {"bad_words": ["3", "S"]}),
    "allowed": (encode("abc"), {"allowed_token_ids": encode("abcdefgh01234")}),
    "min_tokens": (encode("uv"), {"ignore_eos": False, "min_tokens": 8}),
    "regex": (encode("abc"), {"structured_outputs": {"regex": REGEX}, "ignore_eos": False, "max_tokens": 20}),
    "stop": (encode("ABC"), {"stop": ["MN", "hi"], "temperature": 0.7}),
}
NAMES = list(REQUESTS)
FAULTS = ("walks too far", "repeats noise")
SETTINGS = {
    "T=1": {"temperature": 1.0},
    "T=0.7": {"temperature": 0.7},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "top-k": {"temperature": 1.0, "top_k": 5},
}
SEEDS, LENGTH = 200, 8


def sampled(seed: int, max_tokens: int = 12, **more) -> dict:
    return {"temperature": 1.0, "max_tokens": max_tokens, "ignore_eos": True, "seed": seed} | more


def batch() -> dict:
    return generate(
        [prompt for prompt, _ in REQUESTS.values()],
        [sampled(40 + i) | fields for i, (_, fields) in enumerate(REQUESTS.values())],
    )


def small_cache_steps() -> dict[str, dict]:
    prompts = [LONG_PROMPT[i : i + 20] for i in range(4)]
    return {
        "preemption": generate(prompts[:3], [sampled(seed, LONGEST) for seed in (1, 2, 3)]),
        "traffic": {
            "do": "traffic",
            "prompts": prompts,
            "sampling": sampled(9, 14),
            "join": [0, 0, 2, 3],
            "abort": [None, 4, None, 1],
        },
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A target so sharp that at a temperature of 1 about one draft of each step is right."""
    folder = tmp_path_factory.mktemp("models")
    target = predictable.write_target(folder / "target", sharpness=3.0)
    return target, predictable.write_checkpoint(folder / "gumiho")


@pytest.fixture(scope="module")
def results(tmp_path_factory, models):
    steps = {"batch": batch(), "alone": generate([encode("abc")] * 2, [sampled(40), sampled(41)])}
    settings = {
        "block_size": BLOCK,
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": 8,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    plain = pair(*models, steps, **settings)
    cases = {"off": plain["off"], "stock": plain["on"] | {"steps": {"alone": steps["alone"]}}}
    cases["on"] = pair(*models, steps, async_scheduling=True, speculative=SAME, **settings)["on"]
    few = {"num_gpu_blocks_override": 5, "max_model_len": LONGEST, "max_num_seqs": 3, "block_size": BLOCK}
    schedule = {"num_speculative_tokens_per_batch_size": [[1, 1, 7], [2, 2, 3], [3, 8, 5]]}
    few |= {"max_num_batched_tokens": CHUNK}
    cases |= pair(*models, small_cache_steps(), "few", **few, speculative=SAME | schedule)
    return run(tmp_path_factory.mktemp("seeded"), cases, "v2")


@pytest.fixture(scope="module")
def planted(tmp_path_factory, models):
    """Of the requests of the step ``alone``; what is planted stays in the process."""
    steps = {"alone": generate([encode("abc")] * 2, [sampled(40), sampled(41)])}
    on = pair(*models, steps, speculative=SAME)["on"]
    return run(tmp_path_factory.mktemp("planted"), {fault: on | {"plant": fault} for fault in FAULTS}, "v2")


def same(a: dict, b: dict) -> bool:
    return all(a[field] == b[field] for field in ("tokens", "texts", "finish", "stop"))


@pytest.mark.feature("seeded text as without speculation", "V2")
@pytest.mark.parametrize("name", NAMES)
def test_a_seeded_request_gives_what_it_gives_without_speculation(results, name):
    off, on = (step(results, case, "batch")["result"][NAMES.index(name)] for case in ("off", "on"))
    assert same(on, off), name
    if name == "logprobs":
        for a, b in zip(off["logprobs"][0], on["logprobs"][0], strict=True):
            assert b == pytest.approx(a, abs=1e-3)
    if name == "regex":
        assert re.fullmatch(REGEX, on["texts"][0])


def test_drafts_were_accepted_and_rejected_by_two_batches_in_flight(results):
    on = step(results, "on", "batch")
    assert 0 < on["counts"]["accepted"] < on["counts"]["drafted"]
    assert results["on"]["facts"]["batches_in_flight"] == 2
    assert cut_tokens(step(results, "on", "alone")) >= 0
    assert step(results, "on", "batch")["counts"]["prompt_tokens"] > CHUNK


def test_a_seed_gives_the_same_alone(results):
    alone = tokens(step(results, "on", "alone"))
    assert alone[0] == step(results, "on", "batch")["result"][NAMES.index("T=1")]["tokens"]
    assert alone == tokens(step(results, "off", "alone"))


def test_without_the_key_vllms_own_draws_stay(results):
    """The default is vLLM's rejection sampler, whose draws differ: else the equality above would show nothing."""
    assert tokens(step(results, "stock", "alone")) != tokens(step(results, "off", "alone"))


def test_preempted_requests_go_on_with_their_seeds(results):
    off, on = step(results, "few off", "preemption"), step(results, "few on", "preemption")
    assert tokens(on) == tokens(off)
    assert on["counts"]["preemptions"] > 0
    assert 0 < on["counts"]["accepted"] < on["counts"]["drafted"]


def test_requests_that_join_and_leave_change_no_text(results):
    off, on = step(results, "few off", "traffic"), step(results, "few on", "traffic")
    assert sorted(on["result"]["aborted"]) == [1, 3]
    assert on["counts"]["accepted"] > 0
    assert_same_beginnings(off, on)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_wrong_walk_is_caught(results, planted, fault):
    wrong = step(planted, fault, "alone")
    assert wrong["counts"]["accepted"] > 0
    assert tokens(wrong) != tokens(step(results, "off", "alone"))


def test_runner_v1_refuses_with_the_remedy(tmp_path, models):
    cases = pair(*models, {"alone": generate([encode("abc")], sampled(1))}, speculative=SAME)
    error = run(tmp_path, {"on": cases["on"]})["on"]["error"]
    assert error.startswith("DraftModelError: ")
    assert 'seeded_text "same" needs model runner V2' in error
    assert "VLLM_USE_V2_MODEL_RUNNER=1" in error


@pytest.fixture(scope="module", params=SETTINGS)
def many(tmp_path_factory, models, request):
    """200 seeds of a setting, 50 at a time: without speculation, by the walk, and by vLLM's rejection sampler."""
    prompts = [encode(text) for text in ("abc", "xyz 1", "12 ", "The q")]
    setting = SETTINGS[request.param]
    sampling = [sampled(seed, LENGTH - seed % 3, **setting) for seed in range(SEEDS)]
    steps = {"seeds": generate([prompts[seed % 4] for seed in range(SEEDS)], sampling)}
    settings = {"max_num_seqs": 50, "max_num_batched_tokens": 400}
    plain = pair(*models, steps, **settings)
    cases = {"off": plain["off"], "stock": plain["on"]}
    cases["on"] = pair(*models, steps, async_scheduling=True, speculative=SAME, **settings)["on"]
    return run(tmp_path_factory.mktemp("many"), cases, "v2")


@pytest.mark.long
def test_two_hundred_seeds_give_the_same_text(many):
    off, on, stock = (tokens(step(many, case, "seeds")) for case in ("off", "on", "stock"))
    assert len(on) == SEEDS
    assert on == off
    assert sum(a == b for a, b in zip(stock, off, strict=True)) < SEEDS


@pytest.mark.long
def test_as_many_drafts_are_accepted_as_by_the_rejection_sampler(many):
    """First drafts, of as good as independent steps."""
    rates, rounds = [], []
    for case in ("on", "stock"):
        rounds.append(step(many, case, "seeds")["counts"]["drafts"])
        rates.append(many[case]["facts"]["accepted per position"][0] / rounds[-1])
    mean = sum(rates) / 2
    error = math.sqrt(mean * (1 - mean) * sum(1 / n for n in rounds))
    assert abs(rates[0] - rates[1]) < 4 * error, (rates, rounds)
    assert 4 * error < 0.12, "too few steps to tell"


@pytest.mark.long
def test_the_second_drafter_keeps_seeded_text_too(tmp_path, models):
    target, _ = models
    cases = pair(target, predictable.write_moa(tmp_path / "moa"), {"batch": batch()}, speculative=SAME)
    cases["on"]["llm"]["speculative_config"]["method"] = "moa"
    results = run(tmp_path, cases, "v2")
    assert tokens(step(results, "on", "batch")) == tokens(step(results, "off", "batch"))
    assert step(results, "on", "batch")["counts"]["accepted"] > 0


@pytest.mark.long
def test_a_real_model_keeps_its_seeded_text(tmp_path, embedded_target):
    """SmolLM2 with the head of the package, few tokens: a vocabulary of 49,152 is slow in the interpreter."""
    questions = ["The capital of France is", "Once upon a time there was a"]
    steps = {"seeded": generate(questions, [sampled(seed, 8, temperature=0.7) for seed in (1, 2)])}
    settings = {"model": str(embedded_target), "max_num_seqs": 2}
    speculative = {"method": "gumiho", **SAME}
    cases = {"off": {"llm": settings, "steps": steps}}
    cases["on"] = {"llm": settings | {"speculative_config": speculative}, "steps": steps}
    results = run(tmp_path, cases, "v2")
    assert tokens(step(results, "on", "seeded")) == tokens(step(results, "off", "seeded"))
    assert step(results, "on", "seeded")["counts"]["accepted"] > 0


@pytest.mark.long
def test_drafts_that_adaptive_verification_trims_change_no_text(tmp_path, models):
    """Rows are then compacted on the device, where the host does not know whose they are."""
    steps = {
        "seeded": generate([encode(text) for text in ("ABCDEFGH", "q{Z!", "x~3Y")] * 2, [sampled(s) for s in range(6)])
    }
    cases = pair(*models, steps, speculative=SAME | {"enable_adaptive_verification": True})
    cases["on"]["plant"] = "adaptive"
    results = run(tmp_path, cases, "v2")
    verified = results["on"]["facts"]["verification"]
    assert 0 < verified["verified"] < verified["scheduled"]
    assert tokens(step(results, "on", "seeded")) == tokens(step(results, "off", "seeded"))
    assert step(results, "on", "seeded")["counts"]["accepted"] > 0
