"""Gumiho whose first serial step reads several of the target's layers: served, every draft is that of the equations.

`engines.run` holds the drafts, with the target's states from another implementation of the target.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from engines import CORES, UNEQUAL_PROMPTS, generate, greedy, pair, run, step, tokens

pytestmark = pytest.mark.engine
LENGTHS = (1, 7)
BLOCK = 32
LONG = [
    [2 + (start * 31 + i * 7 + i // 5) % (tiny.VOCAB - 2) for i in range(n)] for start, n in enumerate((97, 70, 40))
]
CHUNKS = {"max_num_seqs": 4, "block_size": BLOCK, "max_num_batched_tokens": 48, "enable_prefix_caching": True}
# Enough tokens for the second and third request of a full cache to ask for another block.
FEW = CHUNKS | {"num_gpu_blocks_override": 9, "max_num_seqs": 3}
PLAIN = {"plain": generate(UNEQUAL_PROMPTS, greedy(10, detokenize=False))}
TEXTS = {"long": generate(LONG, greedy(27, detokenize=False))}
AGAIN = TEXTS | {"hit": generate(LONG[:2], greedy(6, detokenize=False))}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    target = tiny.write_target(folder / "target", num_hidden_layers=tiny.TARGET_LAYERS)
    return target, tiny.write_released(folder / "layered", tiny.layered_tensors(), suffix="safetensors")


@pytest.fixture(scope="module", params=["v1", "v2"])
def results(request, tmp_path_factory, models):
    runner = request.param

    def drafted(steps: dict[str, dict], speculative: dict, **llm) -> dict:
        return pair(*models, steps, speculative=speculative, skip_tokenizer_init=True, **llm)["on"]

    cases = {"off": pair(*models, PLAIN | TEXTS, skip_tokenizer_init=True)["off"]}
    cases |= {f"k{length}": drafted(PLAIN, {"num_speculative_tokens": length}) for length in LENGTHS}
    cases["int8"] = drafted(PLAIN, {"draft_weights": "int8"})
    cases["few"] = drafted(AGAIN, {}, **FEW)
    if runner == "v1":
        cases["drawn"] = drafted(PLAIN, {"draft_sample_method": "probabilistic"})
    found = run(tmp_path_factory.mktemp(runner), cases, runner)
    assert found["k7"]["facts"]["runner"] == runner
    return found


def assert_right(results: dict, name: str, on: str) -> None:
    """Texts are the target's own, and `run` held enough drafts to the equations."""
    assert tokens(step(results, name, on)) == tokens(step(results, "off", on)), name
    # Workers elsewhere hand over no draft of a request that has ended.
    assert (results[name]["facts"]["drafts"] or {}).get("compared", 0) > 40, name
    assert f"features of layers {', '.join(map(str, tiny.LAYERS))}" in results[name]["log"]


@pytest.mark.feature("greedy requests: continuous batching, every K, K by batch size", "V1", "gumiho-layers")
@pytest.mark.feature("greedy requests: continuous batching, every K, K by batch size", "V2", "gumiho-layers")
@pytest.mark.feature("8-bit draft weights", "V1", "gumiho-layers")
@pytest.mark.feature("8-bit draft weights", "V2", "gumiho-layers")
@pytest.mark.feature("chunked prefill", "V1", "gumiho-layers")
@pytest.mark.feature("chunked prefill", "V2", "gumiho-layers")
@pytest.mark.feature("prefix caching", "V1", "gumiho-layers")
@pytest.mark.feature("prefix caching", "V2", "gumiho-layers")
@pytest.mark.feature("preemption and recompute", "V1", "gumiho-layers")
@pytest.mark.feature("preemption and recompute", "V2", "gumiho-layers")
def test_drafts_are_those_of_the_equations_and_texts_the_targets_own(results):
    for name in results.keys() - {"off"}:
        assert_right(results, name, "plain" if "plain" in results[name]["steps"] else "long")


@pytest.mark.feature("tensor parallel", "V1", "gumiho-layers")
def test_two_workers_draft_the_same(tmp_path, models):
    settings = CHUNKS | {"skip_tokenizer_init": True, "tensor_parallel_size": 2}
    results = run(tmp_path, pair(*models, TEXTS, **settings), env=CORES)
    assert_right(results, "on", "long")


def test_the_cases_were_what_they_say(results):
    assert step(results, "few", "hit")["counts"]["prefix_hits"] > 0
    assert step(results, "few", "long")["counts"]["preemptions"] > 0
    for length in LENGTHS:
        counts = step(results, f"k{length}", "plain")["counts"]
        assert counts["drafted"] == length * counts["drafts"] > 0
