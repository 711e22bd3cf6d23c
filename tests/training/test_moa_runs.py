"""Training runs of Mixture of Attentions: from data to a checkpoint that an engine drafts from as the equations do."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tiny
import tiny_moa
import torch
from engines import UNEQUAL_PROMPTS, case, generate, greedy, run, step, tokens
from runs import recipe
from safetensors.torch import load_file
from tiny_moa import Wanted

from vllm_gumiho.checkpoint.tensors import D2T
from vllm_gumiho.drafters.checkpoints import open_checkpoint
from vllm_gumiho.drafters.moa import MOA
from vllm_gumiho.drafters.moa.reference import ReferenceMoa
from vllm_gumiho.training.provenance import read_recipe
from vllm_gumiho.training.trainer import train

RUNS = {"moa": {"own_tokens": 0.5, "draft_vocab": 48}, "moa-paper": {"target_layers": [1, 4]}}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return tiny.write_target(tmp_path_factory.mktemp("target"), num_hidden_layers=tiny_moa.TARGET_LAYERS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, target) -> dict[str, tuple[Path, dict[str, float]]]:
    """Folder and measurements of each recipe's run, on counting answers."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("runs")
    lines = []
    for i in range(40):
        start = rng.randrange(2, 100)
        prompt = [rng.randrange(2, 150) for _ in range(5)]
        lines.append({"id": f"s{i}", "prompt": prompt, "answer": [start + j for j in range(20)]})
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = {}
    for name, changes in RUNS.items():
        settings = {"steps": 2, "save_every": 2, "feature_cache": str(folder / "features"), **changes}
        asked = recipe(target, folder / "answers.jsonl", folder / name, recipe=name, learning_rate=1e-2, **settings)
        found[name] = folder / name, train(asked)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_run_measures_exports_and_tells_its_recipe(trained, name):
    folder, metrics = trained[name]
    assert {f"eval_accepted_{i}" for i in range(1, 8)} <= metrics.keys()
    opened = open_checkpoint(folder / "final")
    assert (opened.drafter, opened.sizes.max_draft_tokens) == (MOA, 7)
    # By default a half, two thirds, five sixths and the last, of four.
    assert opened.sizes.target_layers == {"moa": (2, 3, 4), "moa-paper": (1, 4)}[name]
    assert (opened.sizes.draft_vocab_size is not None) == (name == "moa")
    told, _ = read_recipe(folder / "final" / "recipe.json")
    assert (told.recipe, told.own_tokens) == (name, RUNS[name].get("own_tokens", 0.0))
    before = dict(open_checkpoint(folder / "checkpoint-2" / "drafter").tensors())
    after = dict(opened.tensors())
    assert all(torch.equal(before[key], after[key]) for key in after)
    history = json.loads((folder / "final" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_acceptance_length" in entry for entry in history)


def test_training_changes_every_tensor(trained, target, tmp_path):
    folder, _ = trained["moa"]
    asked, _ = read_recipe(folder / "final" / "recipe.json")
    asked.output, asked.learning_rate = str(tmp_path / "still"), 1e-12
    train(asked)
    still = dict(open_checkpoint(tmp_path / "still" / "final").tensors())
    moved = dict(open_checkpoint(folder / "final").tensors())
    assert [name for name in moved if name != D2T and torch.allclose(moved[name], still[name], atol=1e-6)] == []


def wanted_of(folder: Path, target: Path) -> tuple[Wanted, list[int] | None]:
    """The equations with a trained checkpoint, and the ids that it drafts."""
    weights, theirs = load_file(folder / "model.safetensors"), load_file(target / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    layer, shape = config["transformer_layer_config"], config["layer_attention"]
    d2t = weights.pop(D2T, None)
    reference = ReferenceMoa(
        weights=weights,
        embed=theirs["model.embed_tokens.weight"],
        lm_head=theirs["lm_head.weight"],
        num_heads=layer["num_attention_heads"],
        num_kv_heads=layer["num_key_value_heads"],
        head_dim=layer["head_dim"],
        layer_heads=shape["num_heads"],
        layer_kv_heads=shape["num_key_value_heads"],
        layer_head_dim=shape["head_dim"],
        rope_theta=layer["rope_parameters"]["rope_theta"],
        eps=layer["rms_norm_eps"],
        layers=tuple(shape["target_layers"]),
    )
    ids = None if d2t is None else (torch.arange(len(d2t)) + d2t).tolist()
    if ids is not None:
        banned = torch.ones(len(reference.lm_head), dtype=torch.bool)
        banned[ids] = False
        reference.lm_head = reference.lm_head.masked_fill(banned[:, None], 0.0)
    return Wanted(reference, tiny_moa.TargetStates(target, reference.layers)), ids


@pytest.mark.engine
def test_a_trained_checkpoint_drafts_in_an_engine_what_the_equations_draft(tmp_path, trained, target):
    steps = {"plain": generate(UNEQUAL_PROMPTS[:3], greedy(6, detokenize=False))}
    cases = {"off": case(target, None) | {"steps": steps}}
    for name, (folder, _) in trained.items():
        asked = {"model": str(folder / "final"), "num_speculative_tokens": 4}
        settings = {"model": str(target), "skip_tokenizer_init": True, "speculative_config": asked}
        cases[name] = {"llm": settings, "steps": steps, "record features": True}
    results = run(tmp_path, cases)
    for name, (folder, _) in trained.items():
        wanted, allowed = wanted_of(folder / "final", target)
        drafts, features = results[name]["drafts"], results[name]["draft features"]
        assert len(drafts) == len(features) >= 9
        for (text, drafted), found in zip(drafts, features, strict=True):
            follow = wanted.reference.draft(torch.tensor(text), wanted.target.states(text[:-1]), 4, drafted)
            torch.testing.assert_close(torch.tensor(found), follow[1], atol=TOLERANCE, rtol=TOLERANCE)
            if allowed is None:
                assert drafted == follow[0]
            else:
                logits = follow[1] @ wanted.reference.lm_head.T
                assert drafted == [allowed[i] for i in logits[:, allowed].argmax(-1).tolist()]
        assert tokens(step(results, name, "plain")) == tokens(step(results, "off", "plain"))
