"""Every checkpoint format opens to the same drafter, bit for bit, with sizes from its tensors."""

import json
import threading
from pathlib import Path

import pytest
import torch
from layouts import LAYER, hub_cache, old_pickle, sharded
from safetensors.torch import load_file, save_file
from tiny import HIDDEN, VOCAB, drafter_tensors, target_config, write_released

from vllm_gumiho.checkpoint.tensors import EMBEDDING
from vllm_gumiho.drafters import DEFAULT
from vllm_gumiho.drafters.checkpoints import drafter_in, open_checkpoint, save_speculators
from vllm_gumiho.files import write_json
from vllm_gumiho.kernels.eight_bit import quantise_rows


def speculators(folder: Path, tensors: dict) -> Path:
    return save_speculators(folder, tensors, "org/target", LAYER).path


FORMATS = {
    "bin": (lambda f, t: write_released(f, t), "released (bin)"),
    "bin with config": (lambda f, t: write_released(f, t, target_config(num_hidden_layers=2)), "released (bin)"),
    "bin of old torch": (old_pickle, "released (bin)"),
    "safetensors": (lambda f, t: write_released(f, t, suffix="safetensors"), "released (safetensors)"),
    "safetensors with config": (
        lambda f, t: write_released(f, t, target_config(), "safetensors"), "released (safetensors)",
    ),
    "one file": (lambda f, t: write_released(f, t) / "pytorch_model.bin", "released (bin)"),
    "sharded bin": (lambda f, t: sharded(f, t, "bin"), "released (bin)"),
    "sharded safetensors": (lambda f, t: sharded(f, t, "safetensors"), "released (safetensors)"),
    "sharded, no index": (lambda f, t: sharded(f, t, "safetensors", index=False), "released (safetensors)"),
    "speculators": (speculators, "speculators"),
    "hub cache": (hub_cache, "released (safetensors)"),
}  # fmt: skip


def assert_same(read: dict, tensors: dict):
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_tensors_and_sizes(tmp_path, kind):
    write, layout = FORMATS[kind]
    tensors = drafter_tensors()
    embedding = {} if kind == "speculators" else {"embed_tokens.weight": torch.randn(VOCAB, HIDDEN)}
    path = write(tmp_path / "checkpoint", tensors | embedding)
    checkpoint = open_checkpoint(path)
    assert checkpoint.layout == layout
    assert_same(dict(checkpoint.tensors()), tensors)
    assert checkpoint.infos.keys() == (tensors | embedding).keys()
    sizes = checkpoint.sizes
    assert (sizes.hidden_size, sizes.intermediate_size, sizes.query_size, sizes.key_size) == (HIDDEN, 48, 128, 64)
    assert (sizes.num_layers, sizes.num_serial_steps, sizes.num_heads, sizes.fc_bias) == (2, 2, 5, True)
    assert sizes.vocab_size == (VOCAB if embedding else None)
    assert sizes.max_draft_tokens == 7
    assert kind == "one file" or drafter_in(path)


@pytest.mark.parametrize(("heads", "serial", "layers"), [(1, 1, 1), (1, 2, 2), (3, 1, 2), (2, 4, 1), (12, 2, 3)])
def test_sizes_come_from_the_tensors_and_not_from_a_config(tmp_path, heads, serial, layers):
    tensors = drafter_tensors(num_heads=heads, num_serial_steps=serial, num_layers=layers)
    wrong = {"num_serial_steps": 9, "num_parallel_heads": 9, "num_hidden_layers": 9, "intermediate_size": 9}
    sizes = open_checkpoint(write_released(tmp_path, tensors, target_config(**wrong))).sizes
    assert (sizes.num_heads, sizes.num_serial_steps, sizes.num_layers) == (heads, serial, layers)
    assert sizes.max_draft_tokens == heads + serial
    assert sizes.intermediate_size == 48


def test_fc_bias_is_kept_where_there_is_one_and_not_invented(tmp_path):
    tensors = drafter_tensors()
    assert tensors["fc.bias"].abs().max() > 0
    kept = open_checkpoint(write_released(tmp_path / "with", tensors))
    assert kept.sizes.fc_bias
    assert torch.equal(dict(kept.tensors())["fc.bias"], tensors["fc.bias"])
    del tensors["fc.bias"]
    without = open_checkpoint(write_released(tmp_path / "without", tensors))
    assert not without.sizes.fc_bias
    assert "fc.bias" not in dict(without.tensors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saving_in_the_speculators_format_is_bit_exact(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in drafter_tensors().items()}
    embedding = {"embed_tokens.weight": torch.randn(VOCAB, HIDDEN)}
    first = open_checkpoint(write_released(tmp_path / "released", tensors | embedding))
    written = save_speculators(tmp_path / "a", dict(first.tensors()), "org/target", LAYER)
    again = save_speculators(tmp_path / "b", dict(written.tensors()), written.verifier, written.layer_config)
    assert_same(load_file(tmp_path / "a" / "model.safetensors"), tensors)
    assert again.config == written.config
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]


def test_the_speculators_config_says_what_the_tensors_say(tmp_path):
    sizes_in_config = {"num_serial_steps": 1, "num_parallel_heads": 3, "fc_bias": True}
    layer = LAYER | {"num_hidden_layers": 99, "head_dim": 99, "intermediate_size": 99, "model_type": "gpt2", "x": 1}
    tensors = drafter_tensors(num_heads=3, num_serial_steps=1)
    written = save_speculators(tmp_path, tensors, "org/target", layer | {"rope_theta": None})
    assert written.verifier == "org/target"
    assert sizes_in_config.items() <= written.config.items()
    assert written.config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert written.layer_config == LAYER | {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 32,
    }


@pytest.mark.parametrize("shards", ["one file", "bin", "two safetensors"])
def test_int8_is_widened_to_within_half_a_scale(tmp_path, shards):
    tensors = drafter_tensors()
    tensors["layers.0.mlp.up_proj.weight"][3] = 0
    written = save_speculators(tmp_path / "int8", tensors, "org/target", LAYER, int8=True)
    stored = dict(written.tensors(keep=torch.int8))
    if shards == "bin":
        written = open_checkpoint(write_released(tmp_path / "bin", stored))
    elif shards == "two safetensors":
        scales = {name: tensor for name, tensor in stored.items() if name.endswith("_scale")}
        weights = {name: tensor for name, tensor in stored.items() if name not in scales}
        save_file(scales, (tmp_path / "int8" / "model-0.safetensors"))
        save_file(weights, (tmp_path / "int8" / "model.safetensors"))
        written = open_checkpoint(tmp_path / "int8")
    widened = dict(written.tensors())
    assert widened.keys() == tensors.keys()
    matrices = [name for name, tensor in tensors.items() if tensor.ndim == 2 and name != "fc.weight"]
    assert matrices
    for name in matrices:
        scale = stored[f"{name}_scale"]
        assert stored[name].dtype == torch.int8
        assert torch.equal(widened[name], stored[name].float() * scale[:, None])
        assert torch.all((widened[name] - tensors[name]).abs() <= scale[:, None] * 0.5001), name
        rows = tensors[name].abs().amax(dim=1) > 0
        assert torch.all(stored[name].int().abs().amax(dim=1)[rows] == 127), name
    for name in tensors.keys() - set(matrices):
        assert torch.equal(widened[name], tensors[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_fc_is_wide_beside_8_bit_rows(tmp_path, dtype):
    """In rows of any checkpoint, one in floats and one that has it in 8 bits: as near as that is."""
    tensors = drafter_tensors()
    floats = open_checkpoint(write_released(tmp_path / "floats", tensors))
    coded = {name: tensor for name, tensor in tensors.items() if name != EMBEDDING}
    for name in [name for name, tensor in coded.items() if tensor.ndim == 2]:
        coded[name], coded[name + "_scale"] = quantise_rows(coded[name], dtype)
    codes = open_checkpoint(write_released(tmp_path / "codes", coded, suffix="safetensors"))
    for opened, wanted in (
        (floats, tensors["fc.weight"]),
        (codes, coded["fc.weight"].float() * coded["fc.weight_scale"][:, None]),
    ):
        rows = dict(opened.rows(dtype))
        assert torch.equal(rows["fc.weight"], wanted)
        assert "fc.weight_scale" not in rows
        assert {tensor.dtype for name, tensor in rows.items() if tensor.ndim == 2 and not name.endswith("_scale")} == {
            torch.float32,
            dtype,
        }
        assert rows["layers.0.mlp.up_proj.weight"].dtype == dtype


def test_int8_weights_are_a_quarter_of_float32(tmp_path):
    tensors = drafter_tensors()
    for folder, int8 in (("float", False), ("int8", True)):
        save_speculators(tmp_path / folder, tensors, "org/target", LAYER, int8=int8)
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("float", "int8")]
    assert sizes[1] < 0.35 * sizes[0]


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"speculators_model_type": "gumiho"}, DEFAULT), ({"speculators_model_type": "eagle3"}, None), ({}, DEFAULT)],
)
def test_recognition_by_config_and_else_by_tensors(tmp_path, config, expected):
    assert drafter_in(write_released(tmp_path, drafter_tensors(), config)) is expected


def test_other_folders_are_not_taken_for_gumiho(tmp_path):
    eagle = {name: tensor for name, tensor in drafter_tensors().items() if not name.startswith("mlp.")}
    assert not drafter_in(write_released(tmp_path / "eagle", eagle))
    assert not drafter_in(tmp_path / "absent")
    assert not drafter_in(tmp_path)
    (tmp_path / "eagle" / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert not drafter_in(tmp_path / "eagle")


def test_a_reader_never_sees_half_a_json_file(tmp_path):
    file, failures = tmp_path / "config.json", []
    contents = [{"writer": i, "filler": "x" * 50_000} for i in range(4)]
    write_json(file, contents[0])

    def work(action):
        try:
            for _ in range(40):
                action()
        except Exception as error:
            failures.append(error)

    def read():
        assert json.loads(file.read_text()) in contents

    actions = [*(lambda content=content: write_json(file, content) for content in contents), read, read]
    threads = [threading.Thread(target=work, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
