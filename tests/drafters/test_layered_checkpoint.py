"""Checkpoints that read several of the target's layers: who may ask for them, and which targets they do not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import tiny_moa
from fakes import fake_target, refusal, rewritten, states_of

from vllm_gumiho.drafters.checkpoints import open_checkpoint
from vllm_gumiho.drafters.conversion import convert_checkpoint
from vllm_gumiho.errors import CheckpointError


def written(drafter: str, folder: Path) -> str:
    """A checkpoint that reads layers, of either drafter that does."""
    if drafter == "moa":
        return str(tiny_moa.write(folder))
    return str(tiny.write_released(folder, tiny.layered_tensors()))


@pytest.mark.parametrize("drafter", ["moa", "gumiho-layers"])
def test_layers_that_the_target_lacks_are_named(tmp_path, monkeypatch, drafter):
    folder = written(drafter, tmp_path / "ours")
    said = refusal({"model": folder}, states_of(fake_target(), layers=3, monkeypatch=monkeypatch))
    assert "reads states of layer 4, and target org/target has 3 layers; use a checkpoint trained for this" in said


@pytest.mark.parametrize("drafter", ["moa", "gumiho-layers"])
def test_a_target_that_gives_no_states_is_refused(tmp_path, monkeypatch, drafter):
    folder = written(drafter, tmp_path / "ours")
    said = refusal({"model": folder}, states_of(fake_target(), gives=False, monkeypatch=monkeypatch))
    assert "which vLLM's class OtherForCausalLM of target org/target does not give; use a drafter" in said


@pytest.mark.parametrize("kind", ["MiMoForCausalLM", "TransformersForCausalLM", "DeepseekV3ForCausalLM"])
def test_classes_that_say_they_give_states_and_do_not_are_refused(tmp_path, monkeypatch, kind):
    """The last two give all but the embeddings, layer 0."""
    folder = written("gumiho-layers", tmp_path / "ours")
    target = states_of(fake_target(), monkeypatch=monkeypatch, kind=kind)
    said = refusal({"model": folder}, target)
    assert re.search(rf"reads states of .*, which vLLM's class {kind} of target org/target does not give; use a", said)


@pytest.mark.parametrize("said", ["gumiho", "gumiho-layers"])
def test_a_config_that_says_another_drafter_than_the_tensors_is_refused(tmp_path, said):
    tensors = tiny.layered_tensors() if said == "gumiho" else tiny.drafter_tensors()
    folder = tiny.write_released(tmp_path / "head", tensors, suffix="safetensors")
    made = convert_checkpoint(folder, tmp_path / "converted", target=str(tiny.write_target(tmp_path / "target")))
    config = json.loads((made.path / "config.json").read_text()) | {"speculators_model_type": said}
    (made.path / "config.json").write_text(json.dumps(config))
    found = "with" if said == "gumiho" else "without"
    with pytest.raises(
        CheckpointError, match=rf"config.json says '{said}', and its tensors are .* \({found} state_norms"
    ):
        open_checkpoint(made.path)


@pytest.mark.parametrize("asked", [{}, {"method": "gumiho"}, {"method": "eagle"}, {"method": "gumiho-layers"}])
def test_gumiho_that_reads_layers_may_be_asked_for_by_either_name(tmp_path, monkeypatch, asked):
    folder = written("gumiho-layers", tmp_path / "ours")
    spec = rewritten({"model": folder, **asked}, states_of(fake_target(), monkeypatch=monkeypatch))
    assert spec["method"] == "eagle3"
    config = json.loads((Path(spec["model"]) / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == list(tiny.LAYERS)
    plain = str(tiny.write_released(tmp_path / "plain", tiny.drafter_tensors()))
    said = refusal({"model": plain, "method": "gumiho-layers"}, fake_target())
    assert "is a Gumiho checkpoint, and the request names 'gumiho-layers'; name a Layered Gumiho checkpoint" in said


def test_none_is_known_for_a_target_without_its_name():
    with pytest.raises(
        CheckpointError, match=r"no Layered Gumiho checkpoint is known for target 'org/target'\.  Known:\n  none\n"
    ):
        rewritten({"method": "gumiho-layers"}, fake_target())
