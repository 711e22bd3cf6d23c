"""Targets other than a plain model, and what must stay as it is with the plugin loaded.  Runner V1."""

from __future__ import annotations

import predictable
import pytest
import torch
from engines import assert_same, generate, greedy, pair, run, step, tokens
from predictable import encode
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.engine
PROMPTS = ["The quick brown", "12 ", "abc", "{}[]!"]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return predictable.write_target(tmp_path_factory.mktemp("model") / "target")


@pytest.fixture(scope="module")
def results(tmp_path_factory, target):
    folder = tmp_path_factory.mktemp("models")
    checkpoint = predictable.write_checkpoint(folder / "gumiho")
    adapters = [str(predictable.write_adapter(folder / f"adapter{i}", seed=i)) for i in range(2)]
    plain = {"plain": generate(PROMPTS, greedy())}
    adapted = {"adapted": generate(PROMPTS, greedy(), lora=[*adapters, *adapters])}
    # In bfloat16, the only type that 4-bit layers take on a CPU, a close call may fall either way: there is none here.
    clear = predictable.write_target(folder / "clear", noise=0.05)
    four_bits = {}
    for method in ("gptq", "awq"):
        quantised = predictable.write_int4(clear, folder / method, method)
        four_bits |= pair(quantised, checkpoint, plain, method, dtype="bfloat16")
        noisy = predictable.write_int4(target, folder / f"noisy {method}", method)
        scored = {"scored": generate(PROMPTS[:1], greedy(1, prompt_logprobs=0))}
        four_bits[f"{method} noisy"] = pair(noisy, checkpoint, scored, dtype="bfloat16")["off"]
    lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    cases = pair(predictable.write_int8(target, folder / "int8"), checkpoint, plain, "int8")
    cases |= pair(target, checkpoint, plain | adapted, "lora", **lora)
    cases |= pair(target, checkpoint, {}, "sleep", enable_sleep_mode=True)
    cases |= pair(target, checkpoint, {"embed": {"do": "embed", "prompts": PROMPTS}}, "pooling", runner="pooling")
    cases |= four_bits
    cases["pipeline"] = pair(target, checkpoint, {}, pipeline_parallel_size=2)["on"]
    return run(folder, cases)


@pytest.mark.feature("target in eight bits (compressed-tensors W8A8 on the CPU)", "V1")
def test_a_target_in_eight_bits(results):
    on = assert_same(results, "plain", "int8 on", "int8 off")
    assert results["int8 on"]["facts"]["quantization"] == "compressed-tensors"
    assert tokens(on) != tokens(step(results, "lora off", "plain")), "eight bits changed nothing"


@pytest.mark.feature("target in four bits (GPTQ and AWQ on the CPU)", "V1")
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_target_in_four_bits(results, method):
    on = assert_same(results, "plain", f"{method} on", f"{method} off", rejected=False)
    assert on["counts"]["accepted"] > 2 * on["counts"]["drafts"]
    assert results[f"{method} on"]["facts"]["quantization"] == results[f"{method} off"]["facts"]["quantization"]
    assert method in results[f"{method} on"]["facts"]["quantization"]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_four_bits_are_those_of_the_target(results, target, method):
    """Else the equality above would be that of a target whose layers say nothing."""
    ids = torch.tensor([encode(PROMPTS[0])])

    def scores(rounded: bool) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        for name, weight in model.named_parameters():
            if rounded and name.endswith("_proj.weight"):
                levels, scale = predictable.round_to_int4(weight.detach())
                weight.data = (levels * scale).flatten(0, 1).T.contiguous().float()
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(1, ids[0, 1:, None])[:, 0]

    (output,) = step(results, f"{method} noisy", "scored")["result"]
    found = torch.tensor([next(iter(entry.values())) for entry in output["prompt_logprobs"][1:]])
    off_rounded, off_whole = ((found - scores(rounded)).abs().mean() for rounded in (True, False))
    assert 3 * off_rounded < off_whole


@pytest.mark.feature("LoRA adapters on the target", "V1")
def test_adapters_on_the_target(results):
    on = assert_same(results, "adapted", "lora on", "lora off")
    assert_same(results, "plain", "lora on", "lora off")
    without = tokens(step(results, "lora on", "plain"))
    assert all(a != b for a, b in zip(tokens(on), without, strict=True))


@pytest.mark.feature("sleep and wake", "V1")
def test_sleep_mode_is_refused_as_without_gumiho(results):
    assert "Sleep mode is not supported on current platform" in results["sleep on"]["error"]
    assert results["sleep on"]["error"] == results["sleep off"]["error"]


@pytest.mark.feature("pipeline parallel", "V1")
def test_pipeline_parallel_is_refused_with_the_remedy(results):
    assert results["pipeline"]["error"].startswith("CheckpointError: ")
    assert "use pipeline_parallel_size=1 (not 2) and tensor parallelism instead" in results["pipeline"]["error"]


@pytest.mark.feature("embedding models", "V1")
def test_embedding_models_are_untouched(results, target):
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).model
    for case in ("pooling off", "pooling on"):
        entry = step(results, case, "embed")
        assert entry["counts"]["drafts"] == 0
        for prompt, vector in zip(PROMPTS, entry["result"], strict=True):
            with torch.no_grad():
                last = model(torch.tensor([encode(prompt)])).last_hidden_state[0, -1]
            assert torch.allclose(torch.tensor(vector), last / last.norm(), atol=1e-4)
