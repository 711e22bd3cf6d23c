"""Features in model runner V2, under Triton's interpreter: one batch in which each request asks for another one."""

from __future__ import annotations

import json
import re

import predictable
import pytest
from engines import assert_same, assert_same_beginnings, cut_tokens, generate, greedy, pair, run, step, tokens
from predictable import EOS, encode
from release import HASHES_LOOK_AHEAD

pytestmark = pytest.mark.engine
CHUNK, BLOCK, LONGEST = 48, 32, 96
LONG_PROMPT = [2 + (i * 7 + i // 5) % (predictable.VOCAB - 2) for i in range(70)]
REGEX = "[a-z]{4,8}-[0-9]{3}"
SCHEMA = {
    "type": "object", "properties": {"kind": {"enum": ["abcdef", "uvwxyz"]}}, "required": ["kind"],
    "additionalProperties": False,
}  # fmt: skip
CHOICE = ["abcdefghij", "uvwxyz", "0123456789"]
STRUCTURES = {
    "regex": {"regex": REGEX}, "json": {"json": SCHEMA}, "choice": {"choice": CHOICE},
    "grammar": {"grammar": 'root ::= [a-z]{4,6} "; " [0-9]{3,5}'},
}  # fmt: skip
REQUESTS = {
    "long": (LONG_PROMPT, {}),
    "min_tokens": (encode("uv"), {"ignore_eos": False, "min_tokens": 10}),
    "logprobs": (encode("abc"), {"logprobs": 3}),
    "prompt_logprobs": (encode("The quick"), {"prompt_logprobs": 3}),
    "penalties": (encode("{}[]!"), {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5}),
    "bad words": (encode("12 "), {"bad_words": ["S"]}),
    "allowed": (encode("abc"), {"allowed_token_ids": encode("abcdefgh01234")}),
    # n > 1 is for sampled requests only; vLLM's top-k kernel does not run under the interpreter.
    "n": (encode("abc"), {"n": 3, "temperature": 0.01}),
    **{
        name: (encode("abc"), {"structured_outputs": structure, "ignore_eos": False, "max_tokens": 24})
        for name, structure in STRUCTURES.items()
    },
}
NAMES = list(REQUESTS)
# Requests that end inside a draft, one reason a step: the accepted tokens that were not given out show that they did.
ENDS = {
    "eos": generate([encode("uv"), encode("u"), encode("pqrstuvw")], greedy(14, ignore_eos=False)),
    "stop": generate([encode("12 "), encode("abc")], greedy(14, stop=["TU", "ij", "n"])),
    "stop token": generate([encode("abc"), encode("12 ")], greedy(14, stop_token_ids=encode("iU"))),
    "max_tokens": generate([encode("0123")] * 5, [greedy(length) for length in (1, 2, 3, 5, 7)]),
}
# Alone and beside others: no batch so large that a step has no room for every draft, which shifts what is drawn when.
SEEDED = greedy(14, temperature=1.0, seed=5)
REFUSED = {
    "logit_bias": generate([encode("abc")], greedy(4, logit_bias={5: 3.0})),
    "min_p": generate([encode("abc")], {"temperature": 1.0, "min_p": 0.1, "max_tokens": 4}),
}
SHORT = [encode("The quick"), encode("12 ")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v2")
    target, checkpoint = predictable.write_target(folder / "target"), predictable.write_checkpoint(folder / "gumiho")
    prompts = [prompt for prompt, _ in REQUESTS.values()]
    steps = {
        "batch": generate(prompts, [greedy(14) | fields for _, fields in REQUESTS.values()]),
        "seed": generate([encode("abc")], SEEDED),
        "again": generate([LONG_PROMPT, encode("abc")], [greedy(6), SEEDED]),
        **ENDS,
    }
    settings = {
        "block_size": BLOCK,
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": 16,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    cases = pair(target, checkpoint, steps, **settings)
    few = settings | {"num_gpu_blocks_override": 8, "max_model_len": LONGEST, "max_num_seqs": 3}
    cases |= pair(target, checkpoint, small_cache_steps(), "few", **few)
    layer = {"hidden_size": predictable.HIDDEN, "vocab_size": predictable.VOCAB, "intermediate_size": 48}
    config = predictable.tiny.target_config(**layer, max_position_embeddings=48)
    short = predictable.write_checkpoint(folder / "short", config=config)
    cases["short"] = pair(target, short, {"preemption": small_cache_steps()["preemption"]}, **few)["on"]
    return run(folder, cases, "v2")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Other targets and settings, with few requests each."""
    folder = tmp_path_factory.mktemp("v2others")
    target, checkpoint = predictable.write_target(folder / "target"), predictable.write_checkpoint(folder / "gumiho")
    plain = {"plain": generate(SHORT, greedy(10))}
    cases = pair(predictable.write_int8(target, folder / "int8"), checkpoint, plain, "int8")
    lora = pair(target, checkpoint, plain, "lora", enable_lora=True)
    eagle = {"method": "eagle", "model": str(predictable.write_eagle(folder / "eagle")), "num_speculative_tokens": 3}
    cases |= lora | {"lora eagle": lora["lora on"] | {"llm": lora["lora on"]["llm"] | {"speculative_config": eagle}}}
    cases["eagle"] = pair(target, checkpoint, plain | REFUSED)["on"]
    cases["eagle"]["llm"] |= {"speculative_config": eagle}
    cases |= pair(target, checkpoint, plain | REFUSED, "async", async_scheduling=True)
    return run(folder, cases, "v2")


def small_cache_steps() -> dict[str, dict]:
    prompts = [LONG_PROMPT[i : i + 34] for i in range(4)]
    return {
        "preemption": generate(prompts[:3], greedy(LONGEST)),
        "traffic": {
            "do": "traffic",
            "prompts": prompts,
            "sampling": greedy(16),
            "join": [0, 0, 2, 3],
            "abort": [None, 4, None, 1],
        },
    }


def request(results: dict, case: str, name: str) -> dict:
    return step(results, case, "batch")["result"][NAMES.index(name)]


@pytest.mark.feature("chunked prefill", "V2")
@pytest.mark.feature("min_tokens", "V2")
@pytest.mark.feature("repetition, presence and frequency penalties", "V2")
@pytest.mark.feature("bad words", "V2")
@pytest.mark.feature("allowed tokens", "V2")
@pytest.mark.feature("n > 1", "V2")
@pytest.mark.feature("structured output: JSON schema, regex, grammar, choice", "V2")
@pytest.mark.parametrize("name", NAMES)
def test_each_request_gives_the_same_tokens(results, name):
    assert results["on"]["facts"]["runner"] == "v2"
    off, on = request(results, "off", name), request(results, "on", name)
    for field in ("tokens", "texts", "finish", "stop"):
        assert on[field] == off[field], field
    counts = step(results, "on", "batch")["counts"]
    assert 0 < counts["accepted"] < counts["drafted"]


def test_the_requests_got_what_they_asked_for(results):
    found = {name: request(results, "on", name) for name in NAMES}
    assert len(found["min_tokens"]["tokens"][0]) >= 10 > len(tokens(step(results, "on", "eos"))[0][0])
    assert "S" not in found["bad words"]["texts"][0]
    assert set(found["allowed"]["texts"][0]) <= set("abcdefgh01234")
    assert found["n"]["tokens"] == [found["logprobs"]["tokens"][0]] * 3
    assert re.fullmatch(REGEX, found["regex"]["texts"][0])
    assert json.loads(found["json"]["texts"][0])["kind"] in SCHEMA["properties"]["kind"]["enum"]
    assert found["choice"]["texts"][0] in CHOICE
    assert re.fullmatch("[a-z]{4,6}; [0-9]{3,5}", found["grammar"]["texts"][0])
    assert [found[name]["finish"] for name in STRUCTURES] == [["stop"]] * len(STRUCTURES)


@pytest.mark.feature("end of sequence inside a draft", "V2")
@pytest.mark.feature("stop strings and stop tokens", "V2")
@pytest.mark.feature("max_tokens reached inside a draft", "V2")
@pytest.mark.parametrize("name", ENDS)
def test_requests_that_end_inside_a_draft(results, name):
    on = assert_same(results, name, rejected=False)
    assert cut_tokens(on) > 0, "no request ended inside a draft"
    if name == "eos":
        assert all(ids[0][-1] == EOS for ids in tokens(on))
    assert ("length" if name == "max_tokens" else "stop") in {output["finish"][0] for output in on["result"]}


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
    assert again["counts"]["prefix_hits"] == (2 if HASHES_LOOK_AHEAD else 1) * BLOCK
    long, seeded = tokens(again)
    assert long[0] == request(results, "off", "long")["tokens"][0][:6]
    assert [seeded] == tokens(step(results, "on", "seed"))
    assert step(results, "on", "seed")["counts"]["accepted"] > 0
    assert tokens(step(results, "off", "again"))[0] == long


@pytest.mark.feature("preemption and recompute", "V2")
@pytest.mark.feature("prompts and outputs up to max_model_len", "V2")
def test_preempted_requests_are_computed_again_up_to_the_last_position(results):
    on = assert_same(results, "preemption", "few on", "few off")
    assert on["counts"]["preemptions"] > 0
    assert [len(ids[0]) for ids in tokens(on)] == [LONGEST - 34] * 3


@pytest.mark.feature("positions beyond the draft's max_position_embeddings", "V2")
def test_drafts_go_on_beyond_the_drafts_own_length(results):
    on = assert_same(results, "preemption", "short", "few off")
    assert on["counts"]["accepted"] == step(results, "few on", "preemption")["counts"]["accepted"]


@pytest.mark.feature("requests joining, finishing and aborted", "V2")
def test_requests_come_and_go_in_mid_draft(results):
    off, on = step(results, "few off", "traffic"), step(results, "few on", "traffic")
    assert sorted(on["result"]["aborted"]) == [1, 3]
    assert on["counts"]["accepted"] > 0
    lengths = assert_same_beginnings(off, on)
    assert {length for i, length in enumerate(lengths) if i not in (1, 3)} == {16}
    assert on["result"]["cache_usage"] == 0


def test_adapters_are_refused_as_v2_would_put_them_in_wrong_places(others):
    """vLLM 0.32's V2 maps adapters to one row of logits a request, and speculation has K + 1: seen with EAGLE."""
    assert "einsum(): subscript b has size 2" in others["lora eagle"]["steps"]["plain"]["error"]
    refused = "Model Runner V2 does not yet support: LoRA adapters with Gumiho (V1 does: VLLM_USE_V2_MODEL_RUNNER=0)"
    assert refused in others["lora on"]["error"]
    step(others, "lora off", "plain")


@pytest.mark.feature("target in eight bits (compressed-tensors W8A8 on the CPU)", "V2")
def test_a_target_in_eight_bits(others):
    assert_same(others, "plain", "int8 on", "int8 off")
    assert others["int8 on"]["facts"]["quantization"] == "compressed-tensors"


@pytest.mark.feature("logit_bias and min_p", "V2")
@pytest.mark.feature("n-gram and EAGLE speculation, and none", "V2")
@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_refuses_with_eagle_it_refuses_with_gumiho(others, name):
    assert "error" not in others["async off"]["steps"][name]
    for case in ("eagle", "async on"):
        assert "not yet supported with speculative decoding" in others[case]["steps"][name]["error"]
    assert_same(others, "plain", "eagle", "async off")


@pytest.mark.feature("async scheduling", "V2")
def test_async_scheduling(others):
    on = assert_same(others, "plain", "async on", "async off")
    assert tokens(on) == tokens(step(others, "eagle", "plain"))
    assert others["async on"]["facts"]["async_scheduling"]
    assert others["async on"]["facts"]["batches_in_flight"] == 2
    assert not others["eagle"]["facts"]["async_scheduling"]
