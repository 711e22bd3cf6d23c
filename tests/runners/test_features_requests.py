"""What a request may ask for: with Gumiho, the same tokens as with speculation off.  Runner V1."""

from __future__ import annotations

import json
import re

import predictable
import pytest
from engines import assert_same, cut_tokens, generate, greedy, pair, run, step, tokens
from predictable import EOS, encode

pytestmark = pytest.mark.engine
PROMPTS = ["The quick brown", "12 ", "abc", "{}[]!"]
# The target runs on to an end of sequence from these.
TO_EOS = ["uv", "u", "vwx", "pqrstuvw"]
LENGTHS = list(range(1, 13))
PENALTIES = {
    "repetition penalty": {"repetition_penalty": 1.3},
    "presence penalty": {"presence_penalty": 1.5},
    "frequency penalty": {"frequency_penalty": 0.9},
}
NAME, DIGITS = "[a-z]{4,12}", "[0-9]{3,9}"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": f"^{NAME}$"},
        "code": {"type": "string", "pattern": f"^{DIGITS}$"},
        "kind": {"enum": ["abcdef", "uvwxyz"]},
    },
    "required": ["name", "code", "kind"],
    "additionalProperties": False,
}  # fmt: skip
STRUCTURES = {
    "json": {"json": SCHEMA},
    "regex": {"regex": f"{NAME}-{DIGITS}"},
    "grammar": {"grammar": 'root ::= item ("; " item){2}\nitem ::= [a-z]{4,12} | [0-9]{3,9}'},
    "choice": {"choice": ["abcdefghij", "uvwxyz", "0123456789"]},
}
SEEDED = {"temperature": 1.0, "seed": 11, "max_tokens": 16, "ignore_eos": True}


def steps() -> dict[str, dict]:
    chosen = encode("abcdefgh0123456789")
    return {
        "plain": generate(PROMPTS, greedy()),
        "stop string": generate(PROMPTS, greedy(stop=["STU", "tu", "01", "./"])),
        "stop string kept": generate(PROMPTS, greedy(stop=["STU", "tu", "01", "./"], include_stop_str_in_output=True)),
        "stop token": generate(PROMPTS, greedy(stop_token_ids=encode("tU3"))),
        "eos": generate(TO_EOS, greedy(ignore_eos=False)),
        "min_tokens": generate(TO_EOS, greedy(ignore_eos=False, min_tokens=16)),
        "max_tokens": generate(["0123"] * len(LENGTHS), [greedy(length) for length in LENGTHS]),
        "logprobs": generate(PROMPTS, greedy(logprobs=3)),
        "prompt_logprobs": generate(PROMPTS, greedy(8, prompt_logprobs=3)),
        **{name: generate(PROMPTS, greedy(**fields)) for name, fields in PENALTIES.items()},
        "bad words": generate(PROMPTS, greedy(bad_words=["rst", "S", "(*", "78"])),
        "allowed tokens": generate(PROMPTS, greedy(allowed_token_ids=chosen)),
        # n > 1 is for sampled requests only; with one token to sample from, these too have one right answer.
        "n": generate(PROMPTS, greedy(n=3, temperature=1.0, top_k=1)),
        "mixed": generate(PROMPTS, [greedy(24, **fields) for fields in ({}, *PENALTIES.values())]),
        "seed": generate(PROMPTS, SEEDED),
        "seed again": generate(PROMPTS, SEEDED),
        "seed alone": generate(PROMPTS[:1], SEEDED),
        "other seed": generate(PROMPTS, SEEDED | {"seed": 12}),
        "top_k": generate(PROMPTS, SEEDED | {"top_k": 5}),
        **{
            name: generate(["abc", "stu", "12 "], greedy(80, ignore_eos=False, structured_outputs=structure))
            for name, structure in STRUCTURES.items()
        },
        "structured with plain": generate(
            PROMPTS, [greedy(24), greedy(24, structured_outputs=STRUCTURES["regex"], ignore_eos=False)] * 2
        ),
        "logit_bias": generate(PROMPTS, greedy(logit_bias={5: 3.0})),
        "min_p": generate(PROMPTS, {"temperature": 1.0, "min_p": 0.1, "max_tokens": 4}),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("requests")
    target, checkpoint = predictable.write_target(folder / "target"), predictable.write_checkpoint(folder / "gumiho")
    eagle = predictable.write_eagle(folder / "eagle")
    # White space is text too: without this, the target may end an answer with spaces without end.
    settings = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
    cases = pair(target, checkpoint, steps(), **settings)
    cases["eagle"] = {
        "llm": {
            "model": str(target),
            "speculative_config": {"method": "eagle", "model": str(eagle), "num_speculative_tokens": 3},
        },
        "steps": {name: steps()[name] for name in ("plain", "logit_bias", "min_p")},
    }
    processors = {"logits_processors": ["vllm.v1.sample.logits_processor.builtin:MinPLogitsProcessor"]}
    for name in ("eagle", "on"):
        cases[f"{name} with a logits processor"] = {"llm": cases[name]["llm"] | processors, "steps": {}}
    return run(folder, cases)


def test_the_drafter_is_gumiho_and_much_is_accepted(results):
    on = assert_same(results, "plain")
    assert results["on"]["facts"]["draft"] == ["EagleGumihoForCausalLM"]
    assert on["counts"]["accepted"] > on["counts"]["drafts"]


@pytest.mark.feature("stop strings and stop tokens", "V1")
@pytest.mark.parametrize("name", ["stop string", "stop string kept", "stop token"])
def test_stops(results, name):
    on = assert_same(results, name)
    assert "stop" in [output["finish"][0] for output in on["result"]]
    assert cut_tokens(on) > 0, "no stop fell inside a draft"


@pytest.mark.feature("end of sequence inside a draft", "V1")
def test_an_end_of_sequence_inside_a_draft_ends_the_request(results):
    on = assert_same(results, "eos")
    ended = [output for output in on["result"] if output["finish"] == ["stop"]]
    assert len(ended) >= 2
    assert all(output["tokens"][0][-1] == EOS for output in ended)
    assert cut_tokens(on) > 0, "no end of sequence fell inside a draft"


@pytest.mark.feature("min_tokens", "V1")
def test_min_tokens(results):
    on = assert_same(results, "min_tokens")
    assert all(len(output["tokens"][0]) >= 16 for output in on["result"])
    assert any(len(ids[0]) < 16 for ids in tokens(step(results, "off", "eos")))


@pytest.mark.feature("max_tokens reached inside a draft", "V1")
def test_max_tokens_inside_a_draft(results):
    on = assert_same(results, "max_tokens", rejected=False)
    assert [len(ids[0]) for ids in tokens(on)] == LENGTHS
    assert cut_tokens(on) > 0


@pytest.mark.feature("logprobs", "V1")
def test_logprobs(results):
    on = assert_same(results, "logprobs")
    for a, b in zip(step(results, "off", "logprobs")["result"], on["result"], strict=True):
        assert len(b["logprobs"][0]) == len(b["tokens"][0])
        assert_close(a["logprobs"][0], b["logprobs"][0])


@pytest.mark.feature("prompt_logprobs", "V1")
def test_prompt_logprobs(results):
    on = assert_same(results, "prompt_logprobs")
    off = step(results, "off", "prompt_logprobs")["result"]
    for prompt, a, b in zip(PROMPTS, off, on["result"], strict=True):
        assert len(b["prompt_logprobs"]) == len(prompt)
        assert_close(a["prompt_logprobs"][1:], b["prompt_logprobs"][1:])


def assert_close(off: list[dict], on: list[dict]) -> None:
    for a, b in zip(off, on, strict=True):
        assert b == pytest.approx(a, abs=1e-3)


@pytest.mark.feature("repetition, presence and frequency penalties", "V1")
@pytest.mark.parametrize("name", [*PENALTIES, "mixed"])
def test_penalties(results, name):
    on = assert_same(results, name)
    assert tokens(on) != tokens(step(results, "off", "plain")), "the penalty changed nothing"


@pytest.mark.feature("bad words", "V1")
def test_bad_words(results):
    on = assert_same(results, "bad words")
    assert tokens(on) != tokens(step(results, "off", "plain"))
    assert not any("S" in output["texts"][0] for output in on["result"])


@pytest.mark.feature("allowed tokens", "V1")
def test_allowed_tokens(results):
    on = assert_same(results, "allowed tokens")
    assert {token for ids in tokens(on) for token in ids[0]} <= set(encode("abcdefgh0123456789"))


@pytest.mark.feature("n > 1", "V1")
def test_several_completions_of_a_prompt(results):
    on = assert_same(results, "n")
    plain = tokens(step(results, "off", "plain"))
    assert tokens(on) == [ids * 3 for ids in plain]


@pytest.mark.feature("per-request seeds", "V1")
def test_a_seed_fixes_what_is_drawn(results):
    """The draws of an accepted draft are not those of a plain step: equal runs, not equal to speculation off."""
    for case in ("off", "on"):
        first = tokens(step(results, case, "seed"))
        assert tokens(step(results, case, "seed again")) == first
        assert tokens(step(results, case, "seed alone")) == first[:1]
        assert tokens(step(results, case, "other seed")) != first
    assert step(results, "on", "seed")["counts"]["accepted"] > 0


@pytest.mark.feature("sampling: temperature, top-p, top-k; greedy and probabilistic drafts", "V1")
def test_a_request_with_top_k_alone_is_served(results):
    """vLLM 0.32's CPU build fails here with any EAGLE-family draft; see vllm_gumiho/cpu_sampling.py."""
    assert [len(ids[0]) for ids in tokens(step(results, "on", "top_k"))] == [16] * len(PROMPTS)


@pytest.mark.feature("structured output: JSON schema, regex, grammar, choice", "V1")
@pytest.mark.parametrize("name", [*STRUCTURES, "structured with plain"])
def test_structured_output(results, name):
    on = assert_same(results, name, rejected=name != "choice")
    outputs = on["result"][1::2] if name == "structured with plain" else on["result"]
    for output in outputs:
        text = output["texts"][0]
        assert output["finish"] == ["stop"]
        if name == "json":
            answer = json.loads(text)
            assert set(answer) == set(SCHEMA["required"])
            assert re.fullmatch(NAME, answer["name"])
            assert re.fullmatch(DIGITS, answer["code"])
            assert answer["kind"] in SCHEMA["properties"]["kind"]["enum"]
        elif name == "choice":
            assert text in STRUCTURES["choice"]["choice"]
        else:
            item = f"({NAME}|{DIGITS})"
            assert re.fullmatch(f"{item}(; {item}){{2}}" if name == "grammar" else STRUCTURES["regex"]["regex"], text)


@pytest.mark.feature("logit_bias and min_p", "V1")
@pytest.mark.parametrize("name", ["logit_bias", "min_p"])
def test_what_vllm_refuses_with_eagle_it_refuses_with_gumiho(results, name):
    assert "error" not in results["off"]["steps"][name]
    for case in ("eagle", "on"):
        assert results[case]["steps"][name]["error"] == (
            "VLLMValidationError: The min_p and logit_bias sampling parameters are not yet supported with "
            "speculative decoding."
        )
    assert_same(results, "plain", "eagle")


@pytest.mark.feature("custom logits processors", "V1")
def test_custom_logits_processors_are_refused_as_with_eagle(results):
    assert "not supported when speculative decoding" in results["on with a logits processor"]["error"]
    assert results["on with a logits processor"]["error"] == results["eagle with a logits processor"]["error"]
