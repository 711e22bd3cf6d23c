"""Runs of Gumiho whose first step reads several layers: fitted, trained, exported, resumed, and drafted from."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import tiny_moa
import torch
from engines import UNEQUAL_PROMPTS, generate, greedy, pair, run, step, tokens
from many_gumiho import reference_of
from runs import recipe, write_answers
from transformers import AutoModelForCausalLM

from vllm_gumiho.drafters.checkpoints import open_checkpoint
from vllm_gumiho.drafters.conversion import convert_checkpoint
from vllm_gumiho.drafters.gumiho import LAYERED_GUMIHO
from vllm_gumiho.drafters.gumiho.trainable import LayeredGumihoDrafter
from vllm_gumiho.errors import RecipeError
from vllm_gumiho.training.recipes import kind_of
from vllm_gumiho.training.trainer import train
from vllm_gumiho.training.unrolling import draft

LENGTH = 16


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return tiny.write_target(tmp_path_factory.mktemp("target"), num_hidden_layers=tiny.TARGET_LAYERS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, target) -> tuple[Path, dict[str, float]]:
    """The serial part from a linear start, then the heads from its checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_answers(folder)
    more = {"recipe": "unrolled-layers", "target_layers": [1, 4], "feature_cache": str(folder / "features")}
    train(recipe(target, data, folder / "serial", phase="serial", **more))
    heads = recipe(target, data, folder / "heads", phase="heads", init_from=str(folder / "serial" / "final"), **more)
    return folder, train(heads)


def test_a_run_fits_trains_and_exports(trained):
    folder, metrics = trained
    assert {f"eval_accepted_{i}" for i in range(1, 8)} <= metrics.keys()
    serial, heads = (open_checkpoint(folder / name / "final") for name in ("serial", "heads"))
    assert heads.drafter is LAYERED_GUMIHO
    assert heads.sizes.target_layers == (1, 4)
    assert "from states of target layers 1, 4" in heads.sizes.passes()
    before, after = dict(serial.tensors()), dict(heads.tensors())
    first = dict(open_checkpoint(folder / "serial" / "checkpoint-2" / "drafter").tensors())
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == (not name.startswith("mlp.")), name
    moved = {name for name in after if not torch.equal(first[name], before[name])}
    assert {"combine.weight", "combine.bias", "state_norms.1.weight", "fc.weight"} <= moved


def test_by_default_four_layers_of_the_last_half_are_read(target, tmp_path):
    asked = recipe(target, "data", tmp_path, recipe="unrolled-layers")
    kind = kind_of(asked)
    config = AutoModelForCausalLM.from_pretrained(target).config
    assert kind.layers(asked, config) == (2, 3, 4)  # a half, two thirds, five sixths and the last, of four


def test_one_training_pass_computes_what_the_equations_draft(target, tmp_path):
    """From each anchor: the first step on the states' feature, the second and the heads on the drafter's own."""
    checkpoint = tiny.write_released(tmp_path / "layered", tiny.layered_tensors())
    reference = reference_of(target, checkpoint)
    drafter = LayeredGumihoDrafter(tiny.drafter_config(target_layers=tiny.LAYERS))
    drafter.load_state_dict(tiny.layered_tensors())
    torch.manual_seed(2)
    text, lengths = torch.randint(2, tiny.VOCAB, (LENGTH,)), (3, 8, LENGTH - 1)
    states = tiny_moa.TargetStates(target, tiny.LAYERS).states(text.tolist())
    # What stands for the target's own feature is not read.
    held = torch.cat((torch.full((LENGTH, tiny.HIDDEN), torch.nan), states.flatten(1)), dim=-1)
    anchors = torch.zeros(1, LENGTH, dtype=torch.bool)
    anchors[0, [length - 2 for length in lengths]] = True
    with torch.no_grad():
        out = draft(
            drafter,
            reference.embed,
            text[None],
            held[None],
            torch.arange(LENGTH)[None],
            torch.ones(1, LENGTH, dtype=torch.long),
            anchors,
            own_token=lambda features, _: reference.product(features, "lm_head").argmax(-1),
        )
        for i, length in enumerate(lengths):
            _, wanted = reference.draft(text[:length], reference.first_features(states[: length - 1]))
            found = torch.stack([each[i] for each in (*out.serial, *out.heads)])
            torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "target"}, "recipe 'unrolled-layers' has no start from the target's own layers; choose linear or"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"recipe": "unrolled", "target_layers": [1]}, r"recipe 'unrolled' reads the target's last state alone"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(RecipeError, match=message):
        kind_of(recipe("target", "data", "run", **({"recipe": "unrolled-layers"} | changes)))


@pytest.mark.engine
def test_a_trained_head_is_served_converted_or_not(trained, target, tmp_path):
    """`engines.run` holds the drafts to the equations."""
    folder, _ = trained
    final, small = folder / "heads" / "final", tmp_path / "small"
    counts = torch.arange(tiny.VOCAB)
    convert_checkpoint(final, small, int8=True, draft_vocab=64, count_answers=lambda size: counts)
    opened = open_checkpoint(small)
    assert (opened.eight_bit, opened.sizes.draft_vocab_size, opened.drafter) == ("int8", 64, LAYERED_GUMIHO)
    steps = {"plain": generate(UNEQUAL_PROMPTS[:3], greedy(8, detokenize=False))}
    cases = pair(target, final, steps, skip_tokenizer_init=True)
    cases["small"] = pair(target, small, steps, skip_tokenizer_init=True)["on"]
    # Found by the checkpoint alone.
    cases["by itself"] = {"llm": cases["on"]["llm"] | {"speculative_config": {"model": str(final)}}, "steps": steps}
    results = run(tmp_path, cases)
    for name in ("on", "small", "by itself"):
        assert tokens(step(results, name, "plain")) == tokens(step(results, "off", "plain"))
        assert results[name]["facts"]["drafts"]["compared"] > 50
