"""Checkpoints that cannot be used are refused with an error that names the file or the tensor."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from layouts import LAYER, sharded
from safetensors.torch import save_file
from tiny import HIDDEN, drafter_tensors, target_config, write_released

from vllm_gumiho.drafters import DEFAULT
from vllm_gumiho.drafters.checkpoints import open_checkpoint, save_speculators
from vllm_gumiho.drafters.speculators_config import speculators_config
from vllm_gumiho.errors import CheckpointError

NAMES = sorted(drafter_tensors(num_heads=2))
OPTIONAL = {"fc.bias"}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        dict(open_checkpoint(path).tensors())
    return str(error.value)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OPTIONAL])
def test_a_missing_tensor_is_named(tmp_path, name):
    tensors = drafter_tensors(num_heads=2)
    del tensors[name]
    assert name in refusal(write_released(tmp_path, tensors, suffix="safetensors"))


MISSHAPEN = [(name, change) for name in NAMES for change in ("one row more", "another rank", "no rows")] + [
    (name, "one column less") for name, tensor in drafter_tensors(num_heads=2).items() if tensor.ndim == 2
]


@pytest.mark.parametrize(("name", "change"), MISSHAPEN)
def test_a_misshapen_tensor_is_named_with_its_shape(tmp_path, name, change):
    tensors = drafter_tensors(num_heads=2)
    tensor = tensors[name]
    tensors[name] = {
        "one row more": lambda: torch.cat((tensor, tensor[:1])),
        "another rank": lambda: tensor.reshape(-1) if tensor.ndim == 2 else tensor[:, None].contiguous(),
        "one column less": lambda: tensor[:, :-1].contiguous(),
        "no rows": lambda: tensor[:0],
    }[change]()
    message = refusal(write_released(tmp_path, tensors, suffix="safetensors"))
    assert f"{name} has shape {list(tensors[name].shape)}, expected [" in message


def test_a_scalar_fc_weight_is_named(tmp_path):
    message = refusal(write_released(tmp_path, drafter_tensors() | {"fc.weight": torch.tensor(1.0)}))
    assert f"fc.weight has shape [], expected [{HIDDEN}, {2 * HIDDEN}]" in message


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight", "norm.weight", "layers.0.input_layernorm.weight", "layers.0.self_attn.q_proj.bias",
        "mlp.0.6.linear.weight", "mlp.00.0.linear.weight", "mlp.99999999.0.linear.weight", "fc.weight_scale",
    ],
)  # fmt: skip
def test_a_tensor_that_no_drafter_has_is_named(tmp_path, name):
    message = refusal(write_released(tmp_path, drafter_tensors() | {name: torch.ones(HIDDEN)}))
    assert name in message or "missing" in message
    assert len(message) < 1000


@pytest.mark.parametrize("absent", ["fc.", "layers.", "mlp."])
def test_what_is_no_gumiho_checkpoint_at_all_is_said_to_be_none(tmp_path, absent):
    tensors = {name: tensor for name, tensor in drafter_tensors().items() if not name.startswith(absent)}
    assert f"not a Gumiho checkpoint, it has no {absent}" in refusal(write_released(tmp_path, tensors))


def test_a_tensor_in_two_shards_is_named_with_both(tmp_path):
    folder = write_released(tmp_path, drafter_tensors(), suffix="safetensors")
    save_file({"fc.bias": torch.zeros(HIDDEN)}, folder / "model-2.safetensors")
    message = refusal(folder)
    assert "fc.bias" in message
    assert "model.safetensors" in message
    assert "model-2.safetensors" in message


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_missing_shard_is_named(tmp_path, suffix):
    shards = sorted(sharded(tmp_path, drafter_tensors(), suffix).glob(f"*-of-00003.{suffix}"))
    shards[1].unlink()
    assert shards[1].name in refusal(tmp_path)
    for shard in (shards[0], shards[2]):
        shard.unlink()
    assert all(shard.name in refusal(tmp_path) for shard in shards)


def test_a_tensor_that_only_the_index_has_is_named(tmp_path):
    tensors = drafter_tensors()
    folder = sharded(tmp_path, tensors, "safetensors")
    for shard in folder.glob("*.safetensors"):
        content = {n: t for n, t in tensors.items() if n in open_names(shard) and not n.startswith("mlp.4.")}
        save_file(content, shard)
    assert "mlp.4.0.linear.bias" in refusal(folder)


def open_names(file: Path) -> set[str]:
    header = file.read_bytes()
    return set(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]))


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"fc.weight": "../elsewhere.safetensors"}, "../elsewhere.safetensors"),
        ({"fc.weight": "/elsewhere.safetensors"}, "/elsewhere.safetensors"),
        ({"fc.weight": 3}, "3"), ({}, "weight_map"), (["a"], "weight_map"), (None, "weight_map"),
    ],
)  # fmt: skip
def test_an_index_that_leaves_its_folder_or_is_none_is_refused(tmp_path, weight_map, said):
    folder = write_released(tmp_path / "inside", drafter_tensors(), suffix="safetensors")
    save_file(drafter_tensors(), tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = refusal(folder)
    assert "model.safetensors.index.json" in message
    assert said in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_values_that_are_not_finite_are_named(tmp_path, suffix, value):
    tensors = drafter_tensors()
    tensors["mlp.3.2.linear.weight"][5, 7] = value
    message = refusal(write_released(tmp_path, tensors, suffix=suffix))
    assert "mlp.3.2.linear.weight holds NaN or infinity" in message


def int8_tensors(folder: Path) -> dict:
    return dict(save_speculators(folder, drafter_tensors(), "t", LAYER, int8=True).tensors(keep=torch.int8))


ROUNDED = "layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (None, f"needs a floating-point {ROUNDED}_scale"),
        (torch.ones(HIDDEN + 1), f"needs a floating-point {ROUNDED}_scale"),
        (torch.ones(HIDDEN, 1), f"needs a floating-point {ROUNDED}_scale"),
        (torch.ones(HIDDEN, dtype=torch.int8), f"needs a floating-point {ROUNDED}_scale"),
        (torch.full((HIDDEN,), float("nan")), f"{ROUNDED} holds NaN"),
    ],
)
def test_int8_with_a_wrong_scale_is_named(tmp_path, scale, said):
    tensors = int8_tensors(tmp_path / "int8")
    del tensors[f"{ROUNDED}_scale"]
    if scale is not None:
        tensors[f"{ROUNDED}_scale"] = scale
    assert said in refusal(write_released(tmp_path / "broken", tensors, suffix="safetensors"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float8_e5m2])
def test_a_wrong_dtype_is_named(tmp_path, dtype):
    tensors = drafter_tensors()
    tensors["fc.weight"] = tensors["fc.weight"].to(dtype)
    assert f"fc.weight is {dtype}" in refusal(write_released(tmp_path, tensors, suffix="safetensors"))


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_truncated_file_is_named(tmp_path, suffix, keep):
    folder = write_released(tmp_path, drafter_tensors(), suffix=suffix)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert f"{file}: not " in refusal(folder)


def test_a_file_that_changes_after_opening_is_named(tmp_path):
    checkpoint = open_checkpoint(write_released(tmp_path, drafter_tensors(), suffix="safetensors"))
    (tmp_path / "model.safetensors").write_bytes(b"gone")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        dict(checkpoint.tensors())


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["zip", "old torch", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, form):
    folder, marker = tmp_path / "checkpoint", tmp_path / "executed"
    folder.mkdir()
    content, file = drafter_tensors() | {"extra": Malicious(marker)}, folder / "pytorch_model.bin"
    if form == "plain pickle":
        file.write_bytes(pickle.dumps(content["extra"], protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    message = refusal(folder)
    assert str(file) in message
    assert "mkdir, and only tensors are read" in message
    assert "weights_only" not in message
    assert not marker.exists()
    with file.open("rb") as handle:
        torch.load(handle, weights_only=False) if form != "plain pickle" else pickle.load(handle)
    assert marker.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(2)], "holds list"), (torch.ones(2), "holds Tensor"), ({"state_dict": {}}, "entry 'state_dict'"),
        ({"fc.weight": torch.ones(2), "epoch": 3}, "entry 'epoch' is int"), ({7: torch.ones(2)}, "entry 7"),
        ({"fc.weight": torch.ones(2, 2).to_sparse()}, "entry 'fc.weight'"), ({}, "not a Gumiho checkpoint"),
    ],
)  # fmt: skip
def test_a_pickle_of_something_else_is_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert said in refusal(tmp_path)


def test_a_zip_of_something_else_is_refused(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hello", "world")
    (tmp_path / "pytorch_model.bin").write_bytes(buffer.getvalue())
    assert "not readable as a file of tensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "not readable as JSON"), (b"", "not readable as JSON"), (b"\xff\xfe\x00", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"), (b"[1]", "holds list"), (b"null", "holds NoneType"),
        (b'"llama"', "holds str"), (b'{"speculators_model_type": "eagle3"}', "'eagle3', not 'gumiho'"),
        (b'{"speculators_model_type": "gumiho", "transformer_layer_config": 5}', "transformer_layer_config is 5"),
        (b'{"speculators_config": [1]}', "speculators_config is [1]"),
        (b'{"speculators_config": {"verifier": "org/target"}}', "speculators_config.verifier is 'org/target'"),
        (b'{"speculators_config": {"verifier": {"name_or_path": 3}}}', "name_or_path is 3"),
    ],
)  # fmt: skip
def test_a_config_that_is_none_is_named(tmp_path, text, said):
    folder = write_released(tmp_path, drafter_tensors())
    (folder / "config.json").write_bytes(text)
    message = refusal(folder)
    assert "config.json" in message
    assert said in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": None}, "num_attention_heads=None"), ({"num_attention_heads": 5}, "128 rows of q_proj"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"), ({"num_attention_heads": 4.0}, "is 4.0"),
        ({"num_attention_heads": True}, "is True"), ({"num_key_value_heads": -2}, "num_key_value_heads is -2"),
        ({"num_key_value_heads": 4}, "64 rows of k_proj"), ({"hidden_size": 65}, "hidden_size=65"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"), ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": 0}, "rope_theta is 0"), ({"rope_parameters": 3}, "rope_parameters is 3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"), ({"max_position_embeddings": 0.5}, "is 0.5"),
        ({"vocab_size": []}, "vocab_size is []"),
    ],
)  # fmt: skip
def test_a_layer_config_that_contradicts_the_tensors_is_refused(tmp_path, change, said):
    sizes = open_checkpoint(write_released(tmp_path, drafter_tensors())).sizes
    with pytest.raises(CheckpointError) as error:
        speculators_config(DEFAULT, sizes, "org/target", LAYER | change)
    assert said in str(error.value)


def test_saving_what_is_no_drafter_writes_nothing(tmp_path):
    tensors = drafter_tensors()
    del tensors["mlp.0.0.linear.bias"]
    with pytest.raises(CheckpointError, match=r"mlp\.0\.0\.linear\.bias"):
        save_speculators(tmp_path / "out", tensors, "org/target", LAYER)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("make", "said"), [(None, "no such file or folder"), (target_config, "no *.safetensors")])
def test_a_place_without_weights_is_said_to_be_one(tmp_path, make, said):
    folder = tmp_path / "folder"
    if make:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(make()))
    assert said in refusal(folder)


def test_a_link_to_nowhere_is_named(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("../../blobs/absent")
    assert "model.safetensors" in refusal(tmp_path)
