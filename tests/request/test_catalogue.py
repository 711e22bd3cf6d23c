"""Which checkpoint is found for which target, and how a user adds pairs."""

import json
import os
import subprocess
import sys

import huggingface_hub
import pytest

from vllm_gumiho.drafters import DEFAULT, DRAFTERS
from vllm_gumiho.env import CHECKPOINTS
from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.request import catalogue
from vllm_gumiho.request.catalogue import HEADS, checkpoint_for, find_checkpoint, known_pairs, local_path

VICUNA = "lmsys/vicuna-7b-v1.3"
RELEASED = DEFAULT.released
BUILT_IN = {**RELEASED, **{target: str(checkpoint) for target, checkpoint in HEADS.items()}}


@pytest.fixture(autouse=True)
def no_user_table(monkeypatch, tmp_path):
    monkeypatch.delenv(CHECKPOINTS.name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no config"))


def as_hub_name(target, tmp_path):
    return target


def as_other_case(target, tmp_path):
    return target.upper()


def as_cache_snapshot(target, tmp_path):
    folder = tmp_path / "hub" / f"models--{target.replace('/', '--')}" / "snapshots" / "0a1b2c"
    folder.mkdir(parents=True)
    return str(folder)


def as_folder_of_its_name(target, tmp_path):
    folder = tmp_path / target.split("/")[1].lower()
    folder.mkdir()
    return f"{folder}/"


@pytest.mark.parametrize("written", [as_hub_name, as_other_case, as_cache_snapshot, as_folder_of_its_name])
@pytest.mark.parametrize("target", BUILT_IN)
def test_a_known_target_is_found_however_it_is_named(target, written, tmp_path):
    assert find_checkpoint(written(target, tmp_path)) == BUILT_IN[target]


def test_the_seven_released_pairs_are_known():
    assert len(RELEASED) == 7
    assert all(checkpoint.startswith("amd/Gumiho-") for checkpoint in RELEASED.values())


@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=lambda drafter: drafter.name)
def test_a_drafter_named_gives_its_own_checkpoint_and_not_anothers(drafter):
    for target, checkpoint in drafter.released.items():
        assert checkpoint.lower().startswith(drafter.hub_prefix)
        assert find_checkpoint(target, drafter) == checkpoint
        assert checkpoint_for(None, target, drafter.name) == checkpoint_for(drafter.name, target) == checkpoint
    with pytest.raises(CheckpointError, match=f"no {drafter.title} checkpoint is known for target 'unknown/target'"):
        checkpoint_for(None, "unknown/target", drafter.name)
    assert checkpoint_for("some/head", "unknown/target", drafter.name) == "some/head"


@pytest.mark.parametrize(
    "target", ["someone/vicuna-7b-v1.3", "vicuna-7b-v1.3", "lmsys/vicuna-7b-v1.5", "/models/vicuna-7b-v1.3", ""]
)
def test_an_unknown_target_lists_what_is_known_and_how_to_name_one(target):
    with pytest.raises(CheckpointError) as error:
        find_checkpoint(target)
    message = str(error.value)
    assert repr(target) in message
    assert all(f"{known} -> {checkpoint}" in message for known, checkpoint in BUILT_IN.items())
    assert '"model": CHECKPOINT' in message
    assert CHECKPOINTS.name in message


def in_variable(pairs, monkeypatch, tmp_path):
    monkeypatch.setenv(CHECKPOINTS.name, f"  {json.dumps(pairs)}")


def in_file_of_variable(pairs, monkeypatch, tmp_path):
    (tmp_path / "table.json").write_text(json.dumps(pairs))
    monkeypatch.setenv(CHECKPOINTS.name, str(tmp_path / "table.json"))


def in_home_file_of_variable(pairs, monkeypatch, tmp_path):
    (tmp_path / "table.json").write_text(json.dumps(pairs))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(CHECKPOINTS.name, "~/table.json")


def in_config_folder(pairs, monkeypatch, tmp_path, variable=""):
    folder = tmp_path / "config" / "vllm-gumiho"
    folder.mkdir(parents=True)
    (folder / "checkpoints.json").write_text(json.dumps(pairs))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv(CHECKPOINTS.name, variable)


def in_default_config_folder(pairs, monkeypatch, tmp_path):
    in_config_folder(pairs, monkeypatch, tmp_path)
    (tmp_path / "config").rename(tmp_path / ".config")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    "put", [in_variable, in_file_of_variable, in_home_file_of_variable, in_config_folder, in_default_config_folder]
)
@pytest.mark.parametrize("known", [VICUNA, VICUNA.upper()])
def test_a_users_pairs_add_to_the_built_in_ones_and_win_over_them(put, known, monkeypatch, tmp_path):
    put({"me/mine": "/heads/mine", known: "me/better"}, monkeypatch, tmp_path)
    assert find_checkpoint("me/mine") == "/heads/mine"
    assert find_checkpoint(VICUNA) == "me/better"
    assert find_checkpoint("lmsys/vicuna-13b-v1.3") == "amd/Gumiho-vicuna-13b"
    assert list(known_pairs())[:2] == ["me/mine", known]
    assert len(known_pairs()) == len(BUILT_IN) + 1
    with pytest.raises(CheckpointError, match="me/mine -> /heads/mine"):
        find_checkpoint("unknown/target")


def test_the_variable_comes_before_the_config_folder(monkeypatch, tmp_path):
    in_config_folder({VICUNA: "from/folder"}, monkeypatch, tmp_path, variable=json.dumps({VICUNA: "from/variable"}))
    assert find_checkpoint(VICUNA) == "from/variable"


@pytest.mark.parametrize("content", ["{", '{"a": 3}', '{"a": ""}', '{"a": {"b": "c"}}', "{" * 3])
def test_a_broken_table_in_the_variable_is_named(content, monkeypatch):
    monkeypatch.setenv(CHECKPOINTS.name, content)
    with pytest.raises(CheckpointError, match=CHECKPOINTS.name):
        find_checkpoint(VICUNA)


@pytest.mark.parametrize("content", [b"", b"[]", b"[1, 2]", b'"a"', b"\xff\xfe{}", b'{"a": null}', b"[" * 100_000])
def test_a_broken_table_file_is_named(content, monkeypatch, tmp_path):
    file = tmp_path / "table.json"
    file.write_bytes(content)
    monkeypatch.setenv(CHECKPOINTS.name, str(file))
    with pytest.raises(CheckpointError) as error:
        find_checkpoint(VICUNA)
    assert str(file) in str(error.value)


def test_a_table_file_that_is_absent_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(CHECKPOINTS.name, str(tmp_path / "absent.json"))
    with pytest.raises(CheckpointError, match=r"VLLM_GUMIHO_CHECKPOINTS names .*absent\.json, which is no file"):
        find_checkpoint(VICUNA)


def test_a_local_path_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "head").mkdir()
    assert local_path(str(tmp_path / "head")) == tmp_path / "head"
    assert local_path("~/head") == tmp_path / "head"
    for absent in (str(tmp_path / "absent"), "./owner/name", "~/absent", "name", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such file or folder, and not a hub name"):
            local_path(absent)


def test_a_hub_name_fetches_tensors_and_config_of_that_revision(tmp_path, monkeypatch):
    asked = []
    download = lambda *args, **kwargs: asked.append((args, kwargs)) or str(tmp_path)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_path("amd/Gumiho-vicuna-7b", "abc") == tmp_path
    ((args, kwargs),) = asked
    assert args == ("amd/Gumiho-vicuna-7b",)
    assert kwargs["revision"] == "abc"
    assert set(kwargs["allow_patterns"]) == {"config.json", "*.safetensors", "*.bin", "*.index.json"}


@pytest.mark.parametrize("text", ["", "not there\nand more"])
def test_a_failing_hub_is_one_message(text, monkeypatch):
    def download(*_, **__):
        raise OSError(text)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError) as error:
        local_path("amd/Gumiho-vicuna-7b")
    message = str(error.value)
    assert f"amd/Gumiho-vicuna-7b: not a local folder, and the hub did not give it (OSError: {text[:9]})" in message
    assert "and more" not in message


def test_a_hub_name_that_is_not_in_the_cache_when_offline(tmp_path):
    code = f"from {catalogue.__name__} import local_path\nlocal_path('amd/Gumiho-vicuna-7b')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    last = ran.stderr.strip().splitlines()[-1]
    assert ran.returncode == 1
    assert "CheckpointError: amd/Gumiho-vicuna-7b: not a local folder" in last
    assert "HF_HUB_OFFLINE" in last
