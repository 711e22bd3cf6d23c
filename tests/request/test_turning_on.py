"""Every way of asking for Gumiho, what stays as it was, and what a bad request gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from engines import GREEDY, UNEQUAL_PROMPTS, case, run_engines
from release import VERIFIER_BY_NAME
from safetensors.torch import save_file

from vllm_gumiho.drafters.checkpoints import save_speculators

pytestmark = pytest.mark.engine
CALLS = [{"prompts": UNEQUAL_PROMPTS[:2], "sampling": GREEDY | {"max_tokens": 6}}]
WAYS = (
    "method and model",
    "model alone",
    "spec_ arguments",
    "method alone",
    "word as model",
    "speculative_model",
    "verifier by name",
    *([] if VERIFIER_BY_NAME else ["verifier"]),
)
NAMED = "tiny/target"


def speculators_checkpoint(folder: Path, target: str) -> Path:
    save_speculators(folder, tiny.drafter_tensors(), target, tiny.target_config())
    return folder


def in_hub_cache(folder: Path, name: str, model: Path) -> Path:
    """A cache of a model hub in which a model of this name has been fetched."""
    repository = folder / f"models--{name.replace('/', '--')}"
    shutil.copytree(model, repository / "snapshots" / "1")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_target, tiny_checkpoint):
    eagle = tmp_path_factory.mktemp("eagle")
    (eagle / "config.json").write_text(json.dumps(tiny.target_config(num_hidden_layers=1, intermediate_size=48)))
    first = ("fc.weight", "layers.0.")
    save_file({n: t for n, t in tiny.drafter_tensors().items() if n.startswith(first)}, eagle / "model.safetensors")
    empty = tmp_path_factory.mktemp("empty")
    wrong = tiny.write_released(tmp_path_factory.mktemp("wrong"), tiny.drafter_tensors(hidden_size=128))
    checkpoint = str(tiny_checkpoint)
    own = tmp_path_factory.mktemp("speculators")
    hub = in_hub_cache(tmp_path_factory.mktemp("hub"), NAMED, tiny_target)

    def tiny_case(speculative=None, model=tiny_target, **llm):
        return case(model, speculative, CALLS, **llm)

    cases = {
        "off": tiny_case(),
        "method and model": tiny_case({"method": "gumiho", "model": checkpoint, "num_speculative_tokens": 7}),
        "model alone": tiny_case({"model": checkpoint}),
        "spec_ arguments": tiny_case(spec_method="gumiho", spec_model=checkpoint, spec_tokens=7),
        "method alone": tiny_case({"method": "gumiho"}),
        "word as model": tiny_case(spec_model="gumiho"),
        "speculative_model": tiny_case(speculative_model="gumiho") | {"import_first": True},
        "verifier": tiny_case(model=speculators_checkpoint(own / "folder", str(tiny_target))),
        "verifier by name": tiny_case(model=speculators_checkpoint(own / "name", NAMED)),
        "eagle": tiny_case({"method": "eagle", "model": str(eagle), "num_speculative_tokens": 3}),
        "too many": tiny_case({"method": "gumiho", "model": checkpoint, "num_speculative_tokens": 8}),
        "wrong target": tiny_case({"method": "gumiho", "model": str(wrong)}),
        "nothing there": tiny_case({"method": "gumiho", "model": str(empty)}),
        "an EAGLE head": tiny_case({"method": "gumiho", "model": str(eagle)}),
        # Last: after numba, which the n-gram proposer brings, no engine with a draft model starts in this process.
        "ngram": tiny_case({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}),
    }
    pairs = json.dumps({str(tiny_target): checkpoint})
    environment = {"VLLM_GUMIHO_CHECKPOINTS": pairs, "HF_HUB_CACHE": str(hub)}
    return run_engines(tmp_path_factory.mktemp("on"), "v1", cases, environment)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_drafts_with_gumiho_and_keeps_the_text(results, way):
    assert "error" not in results[way], results[way].get("error")
    assert results[way]["drafter"] == "GumihoProposer"
    assert results[way]["k"] == 7
    assert results[way]["tokens"] == results["off"]["tokens"]


def test_a_speculators_checkpoint_served_by_itself_brings_its_target(results, tiny_target):
    assert results["verifier by name"]["model"] == NAMED
    if VERIFIER_BY_NAME:
        assert "Select local verifiers explicitly with --model and --speculative-config" in results["verifier"]["error"]
    else:
        assert results["verifier"]["model"] == str(tiny_target)


@pytest.mark.feature("n-gram and EAGLE speculation, and none", "V1")
@pytest.mark.parametrize(
    ("method", "drafter"), [("ngram", "NgramProposer"), ("eagle", "EagleProposer"), ("off", "NoneType")]
)
def test_other_methods_are_untouched(results, method, drafter):
    assert results[method]["drafter"] == drafter
    assert results[method]["tokens"] == results["off"]["tokens"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("too many", ("num_speculative_tokens=8", "from 1 to 7")),
        ("wrong target", ("hidden size 128", "which has 64", "trained for this target")),
        ("nothing there", ("no *.safetensors and no pytorch_model*.bin",)),
        ("an EAGLE head", ("not a Gumiho checkpoint", "no mlp.*")),
    ],
)
def test_a_bad_request_is_one_clear_error(results, name, words):
    assert results[name]["error"].startswith("CheckpointError: ")
    for word in words:
        assert word in results[name]["error"]
