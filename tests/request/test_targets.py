"""Targets of every kind as a request sees them: their configs, their KV cache groups, and what is said of them."""

from __future__ import annotations

import json
import logging

import pytest
import release
import zoo
from fakes import fake_target, rewritten
from tiny import drafter_tensors, write_released
from typer.testing import CliRunner

from vllm_gumiho.cli import app
from vllm_gumiho.drafters.checkpoints import save_speculators
from vllm_gumiho.drafters.conversion import convert_checkpoint
from vllm_gumiho.drafters.speculators_config import check_verifier
from vllm_gumiho.drafters.target_config import intermediate_size_of, norm_eps_of, rope_of
from vllm_gumiho.drafters.trainable_layers import DrafterConfig
from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.request import asks_for_ours, resolve
from vllm_gumiho.request.kv_groups import tears_drafts_apart
from vllm_gumiho.request.target_check import check_target, problem_of

SLIDING, FULL = zoo.SLIDING, zoo.FULL
NESTED = {SLIDING: {"rope_type": "default", "rope_theta": 1e4}, FULL: {"rope_type": "default", "rope_theta": 1e6}}


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    return write_released(tmp_path / "checkpoint", drafter_tensors())


def layer_of(spec: dict) -> dict:
    with open(f"{spec['model']}/config.json") as file:
        return json.load(file)["transformer_layer_config"]


@pytest.mark.parametrize(
    ("rope", "kept"),
    [
        (NESTED, {"rope_type": "default", "rope_theta": 1e6}),
        ({SLIDING: NESTED[SLIDING]}, {"rope_type": "default", "rope_theta": 1e4}),
        (
            {"rope_type": "mrope", "mrope_section": [4, 6, 6], "rope_theta": 5e5},
            {"rope_type": "default", "rope_theta": 5e5},
        ),
        (
            {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 5e5},
            {"rope_type": "default", "rope_theta": 5e5},
        ),
        (
            {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4},
            {"rope_type": "default", "rope_theta": 1e4},
        ),
        (None, {"rope_type": "default", "rope_theta": 1e4}),
    ],
)
def test_a_checkpoint_without_a_rope_takes_what_llamas_layers_have_of_the_targets(rope, kept, checkpoint):
    """Fault B: nested ropes of kinds of layers, and parts of a rope that are of the target's layers alone."""
    spec = rewritten({"model": str(checkpoint)}, fake_target(rope_parameters=rope))
    assert layer_of(spec)["rope_parameters"] == kept


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_kind_gives_a_draft_its_sizes_and_a_checkpoint_its_config(name, tmp_path):
    """Faults B and G, of training and of ``convert``: keys by any of their names, and none read without asking."""
    config = zoo.config_of(zoo.ZOO[name])
    config.save_pretrained(tmp_path / "target")
    text = config.get_text_config()
    sizes = DrafterConfig.of_target(text, 2, 2, 5, fc_bias=True)
    assert sizes.hidden_size == zoo.HIDDEN
    assert sizes.head_dim == 32
    assert 0 < sizes.rms_norm_eps < 1e-3
    tensors = drafter_tensors(intermediate_size=sizes.intermediate_size)
    source = write_released(tmp_path / "source", tensors)
    written = convert_checkpoint(source, tmp_path / "converted", str(tmp_path / "target"))
    layer = written.layer_config
    assert layer["rope_parameters"] == rope_of(text)
    assert all(not isinstance(value, dict) for value in layer["rope_parameters"].values())
    assert layer["rms_norm_eps"] == norm_eps_of(text)
    assert layer["num_attention_heads"] * 32 == opened_rows(written)


def opened_rows(checkpoint) -> int:
    return checkpoint.infos["layers.0.self_attn.q_proj.weight"].shape[0]


def test_keys_under_other_names_are_found():
    phi, gpt2 = (zoo.config_of(zoo.ZOO[name]) for name in ("phi", "gpt2"))
    phi.layer_norm_eps, gpt2.n_inner = 3e-4, None
    assert norm_eps_of(phi) == 3e-4
    assert intermediate_size_of(gpt2) == 4 * zoo.HIDDEN
    gpt2.n_inner = 100
    assert intermediate_size_of(gpt2) == 100


PATTERNS = [
    *([SLIDING] * a + [FULL] * b for a in range(5) for b in range(5) if a + b),
    [SLIDING, FULL] * 13,
    [SLIDING, FULL] * 4,
    [SLIDING, FULL] * 5,
    ([SLIDING] * 5 + [FULL]) * 4 + [SLIDING] * 2,
    [SLIDING] * 32,
    [FULL] * 32,
    ([SLIDING] * 3 + [FULL]) * 8,
]


@pytest.mark.parametrize("kinds", PATTERNS, ids=lambda kinds: "".join(kind[0] for kind in kinds))
def test_torn_drafts_are_told_as_vllm_groups_layers(kinds):
    """Fault C: held to vLLM's own grouping of the target's layers and two of the draft's."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    size = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    specs = {FULL: FullAttentionSpec(**size), SLIDING: SlidingWindowSpec(**size, sliding_window=32)}
    layers = {f"layers.{i}": specs[kind] for i, kind in enumerate([*kinds, FULL, FULL])}
    drafts = {f"layers.{len(kinds) + i}" for i in range(2)}
    if len(set(kinds) | {FULL}) == 1:
        torn = False
    else:
        torn = sum(bool(drafts & group) for group in release.layer_groups(layers)) > 1
    config = zoo.config_of(zoo.ZOO["gemma3 full"])
    config.layer_types, config.num_hidden_layers = kinds, len(kinds)
    assert tears_drafts_apart(config, 2) == torn


def test_a_target_that_slides_without_saying_where_slides_everywhere():
    config = zoo.config_of(zoo.ZOO["mistral"])
    config.num_hidden_layers = 1
    assert tears_drafts_apart(config, 2)
    config.sliding_window = None
    assert not tears_drafts_apart(config, 2)


def test_a_runner_that_takes_one_group_names_the_remedy():
    from types import SimpleNamespace

    from vllm_gumiho.errors import DraftModelError
    from vllm_gumiho.runners.v1 import DraftProposer

    drafter = object.__new__(DraftProposer)
    drafter.vllm_config = SimpleNamespace(model_config=SimpleNamespace(model="odd"))
    drafter._draft_attn_layer_names = {"a", "b"}
    groups = [SimpleNamespace(layer_names=["a"]), SimpleNamespace(layer_names=["b"])]
    with pytest.raises(DraftModelError, match=r"target odd: .*disable_hybrid_kv_cache_manager=True"):
        drafter.validate_same_kv_cache_group(SimpleNamespace(kv_cache_groups=groups))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"is_encoder_decoder": True, "model_type": "t5"}, "has an encoder"), ({"word_embed_proj_dim": 32}, "32 values")],
)
def test_targets_that_cannot_be_drafted_for_are_refused_at_once(changes, reason, tmp_path, monkeypatch):
    """Fault D: before the checkpoint is looked for, and long before weights."""
    target = fake_target(hidden_size=64, **changes)
    with pytest.raises(CheckpointError, match=reason) as error:
        resolve({"method": "gumiho", "model": str(tmp_path / "none")}, target)
    assert "org/target" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_target_of_images_is_no_problem():
    assert problem_of(zoo.config_of(zoo.ZOO["qwen2_vl"]).get_text_config(), "vision") is None


def test_a_checkpoint_names_its_target_by_a_whole_path(tmp_path, monkeypatch):
    """Fault K: it is served from another folder than it was trained in."""
    (tmp_path / "target").mkdir()
    monkeypatch.chdir(tmp_path)
    layer = {"num_attention_heads": 4, "num_key_value_heads": 2}
    written = save_speculators(tmp_path / "run", drafter_tensors(), "target", layer)
    assert written.verifier == str(tmp_path / "target")
    assert save_speculators(tmp_path / "hub", drafter_tensors(), "org/target", layer).verifier == "org/target"
    check_verifier(str(tmp_path / "run"))
    check_verifier(str(tmp_path / "hub"))
    check_verifier(str(tmp_path))
    check_verifier("org/target")


@pytest.mark.parametrize("name", ["target", "./target", "/no/such/target"])
def test_a_checkpoint_whose_target_is_nowhere_says_so(name, tmp_path, monkeypatch):
    layer = {"num_attention_heads": 4, "num_key_value_heads": 2}
    save_speculators(tmp_path / "run", drafter_tensors(), name, layer)
    with pytest.raises(CheckpointError, match=f"a drafter whose target is '{name}', no folder here and no hub name"):
        check_verifier(str(tmp_path / "run"))


def test_vllms_arguments_look_at_the_checkpoint_served_by_itself(tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    layer = {"num_attention_heads": 4, "num_key_value_heads": 2}
    save_speculators(tmp_path / "run", drafter_tensors(), "target", layer)
    with pytest.raises(CheckpointError, match="a drafter whose target is 'target'"):
        EngineArgs(model=str(tmp_path / "run"))


@pytest.mark.parametrize("unknown", [False, True])
def test_a_draft_config_is_written_without_a_home(unknown, checkpoint, monkeypatch, tmp_path):
    """Fault L: no HOME, and a user whom the machine does not know."""
    import os
    import pwd
    import tempfile

    monkeypatch.delenv("VLLM_CACHE_ROOT")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if unknown:

        def nobody(uid: int):
            raise KeyError(uid)

        monkeypatch.setattr(pwd, "getpwuid", nobody)
        spec = rewritten({"model": str(checkpoint)})
        assert spec["model"].startswith(f"{tmp_path}/vllm-gumiho-{os.getuid()}")
        assert layer_of(spec)["hidden_size"] == 64


@pytest.mark.parametrize("method", ["gumiho", "Gumiho", "GUMIHO", "MoA"])
def test_a_method_is_known_in_any_case(method, checkpoint):
    assert asks_for_ours({"method": method})
    assert asks_for_ours({"model": method})
    if method != "MoA":
        assert rewritten({"method": method, "model": str(checkpoint)})["method"] == "eagle"


def test_auto_is_known_in_any_case(checkpoint):
    asked = {"method": "Gumiho", "model": str(checkpoint), "num_speculative_tokens": "Auto"}
    assert resolve(asked, fake_target()).is_auto


def test_spec_tokens_takes_auto_beside_numbers():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    for written, taken in (("auto", "auto"), ("AUTO", "auto"), ("3", 3)):
        assert parser.parse_args(["--model", "m", "--spec-tokens", written]).spec_tokens == taken
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", "m", "--spec-tokens", "some"])


@pytest.mark.parametrize(("length", "told"), [(32, True), (512, False), (None, False)])
def test_drafts_shorter_than_the_target_are_told_of_once(length, told, checkpoint, caplog):
    spec = {"model": str(checkpoint)} | ({} if length is None else {"max_model_len": length})
    with caplog.at_level(logging.WARNING):
        resolve(spec, fake_target(), load_format="dummy")
    assert caplog.text.count("leaves its whole batch without accepted drafts") == told


def test_check_says_what_is_known_of_a_target_by_its_config_alone(tmp_path):
    for name in ("gemma3 in turn", "qwen2_vl", "llama"):
        zoo.config_of(zoo.ZOO[name]).save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        known = {"gemma3 in turn": "Gemma3ForCausalLM", "llama": "LlamaForCausalLM"}
        config["architectures"] = [known.get(name, "Qwen2VLForConditionalGeneration")]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    found = check_target(str(tmp_path / "llama"))
    assert (found.unserved, found.untrained, found.checkpoint, found.notes) == (None, None, None, ())
    notes = check_target(str(tmp_path / "gemma3 in turn")).notes
    assert any("disable_hybrid_kv_cache_manager" in note for note in notes)
    assert any("Gemma3ForCausalLM gives no states of inner layers" in note for note in notes)
    vision = check_target(str(tmp_path / "qwen2_vl"))
    assert (vision.unserved, vision.untrained) == (None, None)
    assert any("drafts from text" in note for note in vision.notes)


def test_check_names_the_checkpoint_that_fits(tmp_path, monkeypatch):
    folder = tmp_path / "Meta-Llama-3-8B-Instruct"
    zoo.config_of(zoo.ZOO["llama"]).save_pretrained(folder)
    assert check_target(str(folder)).checkpoint == "amd/Gumiho-llama3-8b"


@pytest.mark.parametrize(("named", "code"), [("other", 1), ("other,gumiho", 0), (None, 0)])
def test_check_says_that_vllm_is_told_to_leave_the_plugin_out(named, code, monkeypatch):
    """Else vLLM ends with its list of methods."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if named is not None:
        monkeypatch.setenv("VLLM_PLUGINS", named)
    ran = CliRunner().invoke(app, ["check"])
    assert ran.exit_code == code
    assert ("leaves this plugin out" in " ".join(ran.output.split())) == bool(code)


def test_check_refuses_what_cannot_be_served(tmp_path):
    from transformers import T5Config

    T5Config(d_model=16, num_layers=1, vocab_size=32, architectures=["T5ForConditionalGeneration"]).save_pretrained(
        tmp_path
    )
    ran = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert ran.exit_code == 1
    assert "has an encoder" in " ".join(ran.output.split())
    with pytest.raises(CheckpointError, match="no config of it on this machine"):
        check_target("nobody/nothing")


def test_kinds_that_are_called_tested_are_those_of_the_record():
    from target_list import shown

    from vllm_gumiho.request.target_check import TESTED

    kinds = {zoo.ZOO[name].model_type for name, found in shown().items() if {"trained", "V1"} <= found}
    assert set(TESTED) == kinds
