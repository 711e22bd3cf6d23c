"""Gumiho whose first serial step reads several of the target's layers: served, every draft is that of the equations.

`engines.run` holds the drafts, with the target's states from another implementation of the target.
"""

from __future__ import annotations

from pathlib import Path

import predictable
import pytest
from engines import CORES, assert_same, generate, greedy, pair, run, step
from predictable import VOCAB

pytestmark = pytest.mark.engine
BLOCK = 32
PROMPTS = ["The quick brown", "12 ", "abc", "{}[]!"]
LONG = [[2 + (start * 31 + i * 7 + i // 5) % (VOCAB - 2) for i in range(n)] for start, n in enumerate((97, 70, 40))]
CHUNKS = {"max_num_seqs": 4, "block_size": BLOCK, "max_num_batched_tokens": 48, "enable_prefix_caching": True}
# Enough tokens for the second and third request of a full cache to ask for another block.
FEW = CHUNKS | {"num_gpu_blocks_override": 9, "max_num_seqs": 3}
SHORT = {"short": generate(PROMPTS, [greedy(length) for length in (6, 10, 16, 16)])}
TEXTS = {"long": generate(LONG, greedy(27)), "hit": generate(LONG[:2], greedy(12))}
SCHEDULE = {"num_speculative_tokens_per_batch_size": [[1, 1, 7], [2, 3, 3], [4, 8, 1]]}
DRAWN = {"drawn": generate(PROMPTS, greedy(12, temperature=1.0))}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return predictable.write_target(folder / "target"), predictable.write_layered(folder / "layered")


@pytest.fixture(scope="module", params=["v1", "v2"])
def results(request, tmp_path_factory, models):
    runner = request.param

    def drafted(steps: dict[str, dict], speculative: dict, **llm) -> dict:
        return pair(*models, steps, speculative=speculative, **llm)["on"]

    cases = {"off": pair(*models, SHORT | TEXTS)["off"]}
    lengths = (1, 2, 3, 7) if runner == "v1" else (7,)
    cases |= {f"k{length}": drafted(SHORT, {"num_speculative_tokens": length}) for length in lengths}
    cases["schedule"] = drafted(SHORT, SCHEDULE, max_num_seqs=8)
    cases["int8"] = drafted(SHORT, {"draft_weights": "int8"})
    cases["few"] = drafted(TEXTS, {}, **FEW)
    cases["probabilistic"] = drafted(DRAWN, {"draft_sample_method": "probabilistic", "num_speculative_tokens": 3})
    found = run(tmp_path_factory.mktemp(runner), cases, runner)
    assert found["k7"]["facts"]["runner"] == runner
    return found


def assert_layered(results: dict, name: str) -> None:
    """What drafted is the drafter of this file, and `run` held enough of its drafts to the equations."""
    facts = results[name]["facts"]
    runner = {"v1": "LayeredGumihoProposer", "v2": "GumihoSpeculator"}[facts["runner"]]
    assert (facts["draft"], facts["method"]) == (["Eagle3GumihoForCausalLM"], "eagle3"), name
    assert facts["drafter"] in (runner, "NoneType"), name  # workers elsewhere
    assert facts["drafts"]["compared"] > 40, name


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
    for name in results.keys() - {"off", "probabilistic"}:
        for on in results[name]["steps"]:
            assert_same(results, on, on=name)
        assert_layered(results, name)


def test_drafts_are_drawn_from_the_distributions_of_the_equations(results):
    assert_layered(results, "probabilistic")
    counts = step(results, "probabilistic", "drawn")["counts"]
    assert 0 < counts["accepted"] < counts["drafted"]


def test_the_cases_were_what_they_say(results):
    assert step(results, "few", "hit")["counts"]["prefix_hits"] > 0
    assert step(results, "few", "long")["counts"]["preemptions"] > 0
    counts = step(results, "k7", "short")["counts"]
    assert counts["drafted"] == 7 * counts["drafts"]
    assert step(results, "schedule", "short")["counts"]["drafted"] < 7 * counts["drafts"]
    # One process, whose log is all cases': one line each for their weights.
    log = results["int8"]["log"]
    assert log.count("features of layers 0, 1, 2") >= len(results) - 1
    assert log.count("weights in int8") == 1


@pytest.mark.feature("tensor parallel", "V1", "gumiho-layers")
def test_two_workers_draft_the_same(tmp_path, models):
    results = run(tmp_path, pair(*models, TEXTS, **CHUNKS, tensor_parallel_size=2), env=CORES)
    for on in TEXTS:
        assert_same(results, on)
    assert_layered(results, "on")
