"""Every field of a config.json removed or wrong in turn, draft lengths of every wrong kind, and no network unasked."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import tiny
from fakes import fake_target
from layouts import LAYER
from places import PROCESSES

from vllm_gumiho.drafters.checkpoints import open_checkpoint, save_speculators
from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.request.draft_config import derive_draft_config

ROPE = {"rope_type": "default", "rope_theta": 500000.0}
REMOVED = object()
WRONG = (REMOVED, None, True, -3, 0, 0.5, float("nan"), float("inf"), "junk", "", [], [1], {}, {"a": 1}, 10**30)


def fields(config: dict, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from fields(value, (*at, key))


def changed(config: dict, field: tuple[str, ...], value) -> dict:
    config = copy.deepcopy(config)
    place = config
    for key in field[:-1]:
        place = place[key]
    if value is REMOVED:
        del place[field[-1]]
    else:
        place[field[-1]] = value
    return config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "head"
    layer = LAYER | {"rope_parameters": ROPE, "max_position_embeddings": 512}
    return save_speculators(folder, tiny.drafter_tensors(), "org/target", layer)


NEEDED = (
    "num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size", "rms_norm_eps",
    "max_position_embeddings", "rope_parameters", "rope_theta", "rope_type",
)  # fmt: skip
TAKEN = {
    *((name, value) for name in ("rms_norm_eps", "rope_theta") for value in ("0.5", str(10**30))),
    ("rope_parameters", "{'a': 1}"), ("rope_parameters", "{}"), ("transformer_layer_config", "{'a': 1}"),
}  # fmt: skip
WHOLE = {"released": tiny.target_config(), "speculators": None}


@pytest.mark.parametrize("layout", WHOLE)
def test_each_field_removed_or_wrong_in_turn_is_refused_or_does_not_matter(saved, layout):
    whole = WHOLE[layout] or saved.config
    sound, refused, harmless, taken = None, {}, set(), set()
    for field in [(), *fields(whole)]:
        for value in WRONG if field else (None,):
            (saved.path / "config.json").write_text(json.dumps(changed(whole, field, value) if field else whole))
            try:
                config = derive_draft_config(open_checkpoint(saved.path), fake_target(rope_parameters=ROPE))
            except CheckpointError as error:
                refused[field, str(value)] = str(error)
                continue
            layer = config["transformer_layer_config"]
            if sound is None:
                sound = layer
            differing = {key for key in sound | layer if layer.get(key) != sound.get(key)}
            # What is absent is the target's: all of it where the whole object is another.
            if field != ("transformer_layer_config",):
                assert differing <= {field[-1] if field else None, "rope_parameters"}, (field, value)
            harmless.add(field)
            if field and differing and value is not REMOVED and value is not None:
                taken.add((field[-1], str(value)))
    # Another value of the right kind is the checkpoint's own business; an empty object stands for the target's.
    assert taken <= TAKEN
    names = {field[-1] for field, _ in refused}
    for name in NEEDED:
        assert name in names, name
    for (field, _), message in refused.items():
        assert str(saved.path) in message, field
        assert {"vocab_size": "vocabulary"}.get(field[-1], field[-1]) in message, field
        assert "\n" not in message
    assert ("architectures",) in harmless


@pytest.mark.parametrize(
    "rope", [{}, {"rope_type": "default"}, {"rope_theta": None}, {"rope_theta": 5e5, "type": None}]
)
def test_what_a_rope_config_lacks_is_the_targets(saved, rope):
    (saved.path / "config.json").write_text(json.dumps(tiny.target_config(rope_parameters=rope)))
    config = derive_draft_config(open_checkpoint(saved.path), fake_target(rope_parameters=ROPE))
    rope = config["transformer_layer_config"]["rope_parameters"]
    assert rope["rope_theta"] == 500000.0
    assert None not in rope.values()


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "linear"}, "rope_parameters of type 'linear' has no factor"),
        ({"rope_type": "junk"}, "rope_parameters.rope_type is 'junk', expected one of bailing_mrope, "),
        ({"rope_type": "yarn", "factor": 4.0}, "has no original_max_position_embeddings"),
        (
            {"rope_type": "yarn", "factor": -4.0, "original_max_position_embeddings": 9},
            "factor is -4.0, expected a number",
        ),
    ],
)
def test_a_rope_config_that_no_layer_could_be_built_of_is_refused(saved, rope, words):
    (saved.path / "config.json").write_text(json.dumps(tiny.target_config(rope_parameters=ROPE | rope)))
    with pytest.raises(CheckpointError, match=re.escape(words)):
        derive_draft_config(open_checkpoint(saved.path), fake_target(rope_parameters=ROPE))


LENGTHS = (0, -1, 1.5, 7.0, "7", True, False, 99, 8, 10**30, float("nan"), float("inf"), [7], {"k": 7}, "many", "")
SCHEDULES = (
    [], "x", 3, [7], [[1, 4]], [[1, 4, 8]], [[1, 4, -1]], [[1, 4, "7"]], [[1, 4, 2.0]], [[2, 4, 3]], [[4, 1, 3]],
    [[1, 4, 3], [4, 8, 2]], [[1, 4, True]],
)  # fmt: skip


@pytest.fixture(scope="module")
def configs(tmp_path_factory, tiny_target, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("configs")

    def spec(**change) -> dict:
        return {"speculative_config": {"method": "gumiho", "model": str(tiny_checkpoint)} | change}

    wide = tiny.write_released(folder / "wide", tiny.drafter_tensors(hidden_size=128))
    vocabulary = tiny.write_released(folder / "vocabulary", tiny.drafter_tensors(), tiny.target_config(vocab_size=99))
    damaged = tiny.write_released(folder / "damaged", tiny.drafter_tensors(), suffix="safetensors")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-9])
    cases = {
        "sound": spec(),
        "length null": spec(num_speculative_tokens=None),
        "schedule sound": spec(num_speculative_tokens_per_batch_size=[[1, 4, 7], [8, 64, 0]]),
        "schedule null": spec(num_speculative_tokens_per_batch_size=None),
        "flag": {"spec_method": "gumiho", "spec_model": str(tiny_checkpoint), "spec_tokens": 8},
        "another target's": spec(model=str(wide)),
        "another vocabulary": spec(model=str(vocabulary)),
        "damaged": spec(model=str(damaged)),
        "nowhere": spec(model="/nowhere"),
        "a hub name": spec(model="amd/Gumiho-x"),
        "an unknown key": spec(nonsense=1),
        **{f"length {i}": spec(num_speculative_tokens=value) for i, value in enumerate(LENGTHS)},
        **{f"schedule {i}": spec(num_speculative_tokens_per_batch_size=value) for i, value in enumerate(SCHEDULES)},
    }
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps({"model": str(tiny_target), "cases": cases}))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CACHE_ROOT": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(PROCESSES / "config_main.py"), str(job), str(result)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


@pytest.mark.engine
def test_a_sound_request_makes_a_config(configs):
    for name in ("sound", "length null", "schedule sound", "schedule null"):
        assert configs["results"][name]["k"] == 7, name


@pytest.mark.engine
@pytest.mark.parametrize("i", range(len(LENGTHS)), ids=map(repr, LENGTHS))
def test_a_wrong_draft_length_is_refused_before_an_engine_starts(configs, i):
    error = configs["results"][f"length {i}"]["error"]
    assert error.startswith(f"CheckpointError: num_speculative_tokens={LENGTHS[i]!r} with ")
    assert "give a whole number from 1 to 7" in error


@pytest.mark.engine
@pytest.mark.parametrize("i", range(len(SCHEDULES)), ids=map(repr, SCHEDULES))
def test_a_wrong_schedule_is_refused_before_an_engine_starts(configs, i):
    error = configs["results"][f"schedule {i}"]["error"]
    assert "num_speculative_tokens_per_batch_size" in error
    assert error.startswith(("CheckpointError: ", "ValidationError: "))


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flag", ("num_speculative_tokens=8", "from 1 to 7")),
        ("another target's", ("/wide: hidden size 128", "which has 64", "trained for this target")),
        ("another vocabulary", ("/vocabulary: vocabulary of 99 tokens", "which has 160", "trained for this target")),
        ("damaged", ("damaged/model.safetensors: not a readable safetensors file", "fetch it again")),
        ("nowhere", ("/nowhere: no such file or folder",)),
        ("a hub name", ("amd/Gumiho-x: not a local folder", "HF_HUB_OFFLINE")),
    ],
)
def test_a_wrong_checkpoint_is_refused_before_an_engine_starts(configs, name, words):
    error = configs["results"][name]["error"]
    assert error.startswith("CheckpointError: ")
    for word in words:
        assert word in error


@pytest.mark.engine
def test_an_unknown_key_is_vllms_own_error(configs):
    assert "nonsense" in configs["results"]["an unknown key"]["error"]


@pytest.mark.engine
def test_nothing_reaches_for_a_network_offline(configs):
    assert configs["network"] == []
    assert len(configs["results"]) > 30


def test_the_watch_of_the_network_sees_an_attempt():
    """In a process of its own, as a watch cannot be taken away."""
    code = (
        "import socket; from config_main import watch_network; seen = watch_network()\n"
        "socket.socket().connect_ex(('127.0.0.1', 1)); print(seen)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROCESSES, capture_output=True, text=True, check=True)
    assert "127.0.0.1" in done.stdout
