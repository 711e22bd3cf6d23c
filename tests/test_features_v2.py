"""Features in model runner V2, under Triton's interpreter: one batch in which each request asks for another one."""

from __future__ import annotations

import re

import predictable
import pytest
from features import assert_same, cut_tokens, generate, greedy, pair, run, step, tokens
from predictable import EOS, encode

pytestmark = pytest.mark.engine
CHUNK, BLOCK, LONGEST = 48, 32, 96
LONG_PROMPT = [2 + (i * 7 + i // 5) % (predictable.VOCAB - 2) for i in range(70)]
REGEX = "[a-z]{4,8}-[0-9]{3}"
REQUESTS = {
    "long": (LONG_PROMPT, {}),
    "eos": (encode("uv"), {"ignore_eos": False}),
    "min_tokens": (encode("uv"), {"ignore_eos": False, "min_tokens": 10}),
    "stop": (encode("12 "), {"stop": ["TU"]}),
    "max_tokens": (encode("0123"), {"max_tokens": 5}),
    "logprobs": (encode("abc"), {"logprobs": 3}),
    "prompt_logprobs": (encode("The quick"), {"prompt_logprobs": 3}),
    "penalties": (encode("{}[]!"), {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5}),
    "bad words": (encode("12 "), {"bad_words": ["S"]}),
    "allowed": (encode("abc"), {"allowed_token_ids": encode("abcdefgh01234")}),
    "regex": (encode("abc"), {"structured_outputs": {"regex": REGEX}, "ignore_eos": False}),
    "seed": (encode("abc"), {"temperature": 1.0, "seed": 5}),
}
NAMES = list(REQUESTS)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v2")
    target, checkpoint = predictable.write_target(folder / "target"), predictable.write_checkpoint(folder / "gumiho")
    prompts = [prompt for prompt, _ in REQUESTS.values()]
    steps = {
        "batch": generate(prompts, [greedy(14) | fields for _, fields in REQUESTS.values()]),
        "again": generate([LONG_PROMPT, REQUESTS["seed"][0]], [greedy(6), greedy(14) | REQUESTS["seed"][1]]),
    }
    settings = {"block_size": BLOCK, "max_num_batched_tokens": CHUNK, "max_num_seqs": 12}
    cases = pair(target, checkpoint, steps, **settings)
    few = settings | {"num_gpu_blocks_override": 8, "max_model_len": LONGEST, "max_num_seqs": 3}
    cases |= pair(target, checkpoint, small_cache_steps(), "few", **few)
    return run(folder, cases, "v2")


def small_cache_steps() -> dict[str, dict]:
    prompts = [LONG_PROMPT[i : i + 34] for i in range(4)]
    return {
        "preemption": generate(prompts[:3], greedy(LONGEST)),
        "traffic": {
            "do": "traffic", "prompts": prompts, "sampling": greedy(16), "join": [0, 0, 2, 3],
            "abort": [None, 4, None, 1],
        },
    }  # fmt: skip


def request(results: dict, case: str, name: str) -> dict:
    return step(results, case, "batch")["result"][NAMES.index(name)]


@pytest.mark.feature("chunked prefill", "V2")
@pytest.mark.feature("end of sequence inside a draft", "V2")
@pytest.mark.feature("min_tokens", "V2")
@pytest.mark.feature("stop strings and stop tokens", "V2")
@pytest.mark.feature("max_tokens reached inside a draft", "V2")
@pytest.mark.feature("repetition, presence and frequency penalties", "V2")
@pytest.mark.feature("bad words", "V2")
@pytest.mark.feature("allowed tokens", "V2")
@pytest.mark.feature("structured output: JSON schema, regex, grammar, choice", "V2")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "seed"])
def test_each_request_gives_the_same_tokens(results, name):
    assert results["on"]["facts"]["runner"] == "v2"
    off, on = request(results, "off", name), request(results, "on", name)
    for field in ("tokens", "texts", "finish", "stop"):
        assert on[field] == off[field], field
    counts = step(results, "on", "batch")["counts"]
    assert 0 < counts["accepted"] < counts["drafted"]


def test_the_requests_got_what_they_asked_for(results):
    found = {name: request(results, "on", name) for name in NAMES}
    assert found["eos"]["tokens"][0][-1] == EOS
    assert len(found["min_tokens"]["tokens"][0]) >= 10 > len(found["eos"]["tokens"][0])
    assert found["stop"]["finish"] == ["stop"]
    assert len(found["max_tokens"]["tokens"][0]) == 5
    assert "S" not in found["bad words"]["texts"][0]
    assert set(found["allowed"]["texts"][0]) <= set("abcdefgh01234")
    assert re.fullmatch(REGEX, found["regex"]["texts"][0])
    assert cut_tokens(step(results, "on", "batch")) > 0, "no request ended inside a draft"


@pytest.mark.feature("logprobs", "V2")
@pytest.mark.feature("prompt_logprobs", "V2")
def test_logprobs_are_close(results):
    off, on = request(results, "off", "logprobs"), request(results, "on", "logprobs")
    for a, b in zip(off["logprobs"][0], on["logprobs"][0], strict=True):
        assert b == pytest.approx(a, abs=1e-3)
    off, on = request(results, "off", "prompt_logprobs"), request(results, "on", "prompt_logprobs")
    for a, b in zip(off["prompt_logprobs"][1:], on["prompt_logprobs"][1:], strict=True):
        assert b == pytest.approx(a, abs=1e-3)


@pytest.mark.feature("prefix caching", "V2")
@pytest.mark.feature("per-request seeds", "V2")
def test_a_prompt_seen_before_and_a_seed_give_the_same_again(results):
    again = step(results, "on", "again")
    assert again["counts"]["prefix_hits"] == BLOCK
    long, seeded = tokens(again)
    assert long[0] == request(results, "off", "long")["tokens"][0][:6]
    assert seeded == request(results, "on", "seed")["tokens"]
    assert tokens(step(results, "off", "again"))[0] == long


@pytest.mark.feature("preemption and recompute", "V2")
@pytest.mark.feature("prompts and outputs up to max_model_len", "V2")
def test_preempted_requests_are_computed_again_up_to_the_last_position(results):
    on = assert_same(results, "preemption", "few on", "few off")
    assert on["counts"]["preemptions"] > 0
    assert [len(ids[0]) for ids in tokens(on)] == [LONGEST - 34] * 3


@pytest.mark.feature("requests joining, finishing and aborted", "V2")
def test_requests_come_and_go_in_mid_draft(results):
    off, on = step(results, "few off", "traffic"), step(results, "few on", "traffic")
    assert sorted(on["result"]["aborted"]) == [1, 3]
    assert on["counts"]["accepted"] > 0
    for i, (a, b) in enumerate(zip(off["result"]["outputs"], on["result"]["outputs"], strict=True)):
        length = min(len(a["tokens"][0]), len(b["tokens"][0]))
        assert length > 0
        assert a["tokens"][0][:length] == b["tokens"][0][:length], f"request {i}"
        assert i in (1, 3) or length == 16
    assert on["result"]["cache_usage"] == 0
