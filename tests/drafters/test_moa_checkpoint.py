"""Mixture of Attentions checkpoints: both layouts, sizes from the tensors, and what a wrong one is told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import tiny_moa
import torch
from fakes import PARALLEL, fake_target, refusal, rewritten, states_of
from torch import Tensor

from vllm_gumiho.checkpoint.files import TensorInfo
from vllm_gumiho.checkpoint.tensors import D2T
from vllm_gumiho.drafters import DEFAULT
from vllm_gumiho.drafters.checkpoints import drafter_in, open_checkpoint
from vllm_gumiho.drafters.conversion import convert_checkpoint
from vllm_gumiho.drafters.moa import MOA
from vllm_gumiho.drafters.moa.layout import LayerShape, read_sizes, tensor_shapes
from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.request import asks_for_ours

TENSORS = tiny_moa.tensors()
# The published one: config.json is the target's own, and names of its class are all it adds.
PUBLISHED = {"architectures": ["MOASpecLlamaForCausalLM"], "num_hidden_layers": 4, "intermediate_size": 96}


@pytest.fixture
def target(monkeypatch):
    return states_of(fake_target(), monkeypatch=monkeypatch)


def released(folder: Path, tensors: dict[str, Tensor], **config) -> Path:
    return tiny.write_released(folder, tensors, tiny.target_config(**PUBLISHED) | config, "safetensors")


def test_both_layouts_open_to_the_same_tensors_and_sizes(tmp_path):
    ours = open_checkpoint(tiny_moa.write(tmp_path / "ours"))
    theirs = open_checkpoint(released(tmp_path / "theirs", TENSORS))
    assert (ours.drafter, ours.layout, theirs.layout) == (MOA, "speculators", "released (safetensors)")
    assert theirs.drafter is MOA
    for opened in (ours, theirs):
        read = dict(opened.tensors())
        assert read.keys() == TENSORS.keys()
        assert all(torch.equal(read[name], TENSORS[name]) for name in read)
        sizes = opened.sizes
        assert (sizes.hidden_size, sizes.intermediate_size, sizes.query_size, sizes.key_size) == (64, 48, 128, 64)
        assert (sizes.layer_width, sizes.layer_intermediate_size) == (64, 40)
        assert (sizes.layer_query_size, sizes.layer_key_size) == (64, 32)
        assert sizes.target_layers == tiny_moa.LAYERS
        assert (sizes.num_layers, sizes.max_draft_tokens) == (2, 7)
    assert (ours.sizes.layer_heads, theirs.sizes.layer_heads) == (4, None)


def test_the_published_layout_at_the_8b_shape():
    """Names and shapes as the released code makes them for Llama-3-8B: keys and values of all layers, 264 M weights."""

    def layer(at: str, width: int, inner: int, query: int, key: int) -> dict[str, tuple[int, ...]]:
        attention = {"q": (query, width), "k": (key, width), "v": (key, width), "o": (width, query)}
        mlp = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
        return {
            **{f"{at}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()},
            **{f"{at}.mlp.{name}_proj.weight": shape for name, shape in mlp.items()},
            f"{at}.input_layernorm.weight": (width,),
            f"{at}.post_attention_layernorm.weight": (width,),
        }

    shapes = layer("self_attention", 4096, 6144, 4096, 512) | layer("cross_attention", 4096, 6144, 4096, 512)
    shapes |= layer("layer_self_attention", 2048, 3072, 2048, 512)
    shapes |= {"Ekv2E.weight": (4096, 2048), "Ekv2E.bias": (4096,)}
    infos = {name: TensorInfo(shape, torch.bfloat16, Path("model")) for name, shape in shapes.items()}
    sizes = read_sizes(Path("released"), infos, {"num_attention_heads": 32, "num_key_value_heads": 8})
    assert tensor_shapes(sizes) == shapes
    assert sizes.layer_shape(32) == LayerShape(2048, 3072, 32, 8, 64, ())
    assert sizes.target_layers == ()
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert round(count / 1e6, 1) == 264.3


def test_recognition(tmp_path):
    folder = tiny_moa.write(tmp_path / "ours")
    assert drafter_in(folder) is drafter_in(released(tmp_path / "theirs", TENSORS)) is MOA
    assert asks_for_ours({"model": str(folder)})
    assert asks_for_ours({"method": "eagle3", "model": str(folder)})
    assert not asks_for_ours({"method": "eagle", "model": str(folder)})
    assert asks_for_ours({"model": "huawei-noah/MOASpec-Llama-3-8B-Instruct"})
    assert drafter_in(tiny.write_released(tmp_path / "gumiho", tiny.drafter_tensors())) is DEFAULT


def test_a_request_becomes_an_eagle3_config_that_names_the_layers(tmp_path, target, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    folder = tiny_moa.write(tmp_path / "ours")
    spec = rewritten({"method": "moa", "model": str(folder), "num_speculative_tokens": 3}, target)
    assert (spec["method"], spec["num_speculative_tokens"]) == ("eagle3", 3)
    config = json.loads((Path(spec["model"]) / "config.json").read_text())
    assert config["architectures"] == ["Eagle3MoaForCausalLM"]
    assert config["eagle_aux_hidden_state_layer_ids"] == list(tiny_moa.LAYERS)
    assert config["layer_attention"]["num_heads"] == 4
    assert config["transformer_layer_config"]["num_hidden_layers"] == 2


def test_the_published_config_is_the_targets_and_its_key_heads_are_not_the_drafts(tmp_path, target, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    folder = released(tmp_path / "theirs", TENSORS, num_key_value_heads=4)
    config = json.loads((Path(rewritten({"model": str(folder)}, target)["model"]) / "config.json").read_text())
    layer = config["transformer_layer_config"]
    assert (layer["num_attention_heads"], layer["num_key_value_heads"], layer["intermediate_size"]) == (4, 2, 48)
    assert (config["layer_attention"]["num_heads"], config["layer_attention"]["head_dim"]) == (4, 16)


@pytest.mark.parametrize("int8", [False, True])
def test_conversion_keeps_what_no_tensor_tells(tmp_path, int8):
    source = tiny_moa.write(tmp_path / "ours")
    config = json.loads((source / "config.json").read_text())
    config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = 5
    (source / "config.json").write_text(json.dumps(config))
    written = convert_checkpoint(source, tmp_path / "converted", int8=int8)
    assert (written.drafter, written.sizes.max_draft_tokens, written.sizes.layer_heads) == (MOA, 5, 4)
    assert written.sizes.target_layers == tiny_moa.LAYERS
    if not int8:
        assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in written.tensors())


def test_a_draft_vocabulary_is_known(tmp_path):
    d2t = {D2T: torch.arange(10)}
    assert open_checkpoint(released(tmp_path, TENSORS | d2t)).sizes.draft_vocab_size == 10


def test_a_checkpoint_of_another_target_is_refused(tmp_path, target, monkeypatch):
    folder = str(tiny_moa.write(tmp_path / "ours"))
    target.get_hidden_size = lambda: 128
    assert "hidden size 64 does not fit target org/target, which has 128" in refusal({"model": folder}, target)


def test_a_context_split_over_ranks_is_refused(tmp_path, target):
    folder = str(tiny_moa.write(tmp_path / "ours"))
    split = SimpleNamespace(**vars(PARALLEL) | {"decode_context_parallel_size": 2})
    with pytest.raises(CheckpointError, match=r"use decode_context_parallel_size=1 \(not 2\)"):
        rewritten({"model": folder}, target, split)


def test_target_layer_inference_is_refused_by_name(tmp_path):
    folder = released(tmp_path / "tli", TENSORS, target_layer_inference=1)
    with pytest.raises(CheckpointError, match=r"target_layer_inference=1: .*copies of the target's last layers"):
        open_checkpoint(folder)
    assert open_checkpoint(released(tmp_path / "none", TENSORS, target_layer_inference=0)).drafter is MOA


@pytest.mark.parametrize(("named", "said"), [("gumiho", "is a MoA checkpoint"), ("moa", "is a Gumiho checkpoint")])
def test_another_drafter_than_the_one_named_is_refused(tmp_path, target, named, said):
    ours = tiny_moa.write(tmp_path / "moa")
    gumiho = tiny.write_released(tmp_path / "gumiho", tiny.drafter_tensors())
    folder = {"gumiho": ours, "moa": gumiho}[named]
    found = refusal({"method": named, "model": str(folder)}, target)
    assert said in found
    assert f"the request names {named!r}; name a" in found


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_a_missing_tensor_is_named(tmp_path, name):
    tensors = {other: tensor for other, tensor in TENSORS.items() if other != name}
    if name.startswith("state_norms."):  # another set of layers, and a whole drafter
        assert len(open_checkpoint(released(tmp_path, tensors)).sizes.target_layers) == 2
        return
    with pytest.raises(CheckpointError, match=rf"tensors are missing: {name}; fetch the checkpoint again"):
        open_checkpoint(released(tmp_path, tensors))


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_a_misshapen_tensor_is_named(tmp_path, name):
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[.*\], expected \["):
        open_checkpoint(released(tmp_path, TENSORS | {name: torch.zeros(*TENSORS[name].shape[:-1], 3)}))


def test_tensors_of_others_are_not_dropped(tmp_path):
    with pytest.raises(CheckpointError, match=r"no MoA drafter has tensors self_attention\.self_attn\.q_proj\.bias"):
        open_checkpoint(released(tmp_path, TENSORS | {"self_attention.self_attn.q_proj.bias": torch.zeros(128)}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer_attention": {"num_heads": 3}}, "expected num_heads that divides the 64 rows"),
        ({"layer_attention": {"num_heads": True}}, "expected num_heads that divides"),
        ({"layer_attention": 4}, "layer_attention of config.json is 4"),
        ({"speculators_config": {"proposal_methods": [{"speculative_tokens": 0}]}}, "expected speculative_tokens"),
        ({"speculators_config": {"proposal_methods": 3}}, "proposal_methods of config.json is 3"),
    ],
)
def test_a_wrong_value_of_the_config_is_named(tmp_path, change, said):
    folder = tiny.write_released(tmp_path, TENSORS, tiny.target_config(**PUBLISHED) | change, "safetensors")
    with pytest.raises(CheckpointError, match="fetch the checkpoint again") as error:
        open_checkpoint(folder)
    assert said in str(error.value)


@pytest.fixture
def of_keys(tmp_path, monkeypatch) -> tuple[str, SimpleNamespace]:
    """A checkpoint that reads keys and values, and its target."""
    target = states_of(fake_target(), monkeypatch=monkeypatch)
    target.get_total_num_kv_heads = lambda: 2
    return str(released(tmp_path / "keys", tiny_moa.tensors(layers=()))), target


def test_keys_and_values_are_asked_of_all_layers(of_keys, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    folder, target = of_keys
    assert open_checkpoint(folder).sizes.passes().endswith("keys and values of all target layers")
    config = json.loads((Path(rewritten({"model": folder}, target)["model"]) / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2, 3]
    assert (config["layer_attention"]["target_layers"], config["layer_attention"]["width"]) == ([], 128)


def test_keys_and_values_of_another_shape_than_the_targets_are_refused(of_keys):
    folder, target = of_keys
    target.get_total_num_kv_heads = lambda: 4
    said = refusal({"model": folder}, target)
    assert "of 128 numbers a token and layer, and target org/target has 256 (4 heads of 32); use a checkpoint" in said


def test_keys_and_values_of_an_unknown_class_are_refused(of_keys, monkeypatch):
    folder, target = of_keys
    other = SimpleNamespace(__name__="DeepseekV2ForCausalLM")
    monkeypatch.setattr("vllm.model_executor.model_loader.utils.get_model_cls", lambda _: other)
    said = refusal({"model": folder}, target)
    assert "cannot be made again for vLLM's class DeepseekV2ForCausalLM of target org/target (for Llama" in said
    assert "use a checkpoint that reads states" in said
