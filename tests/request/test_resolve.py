"""From what a user writes to the EAGLE-family config that drafts with Gumiho, without an engine."""

import copy
import json
import os
import tempfile
from types import SimpleNamespace

import pytest
from fakes import ROPE, fake_target, rewritten
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYER
from tiny import HIDDEN, VOCAB, drafter_tensors, target_config, write_released
from vllm.config import ParallelConfig

from vllm_gumiho.drafters import DEFAULT, drafter_of
from vllm_gumiho.drafters.checkpoints import open_checkpoint, save_speculators
from vllm_gumiho.drafters.speculators_config import update_draft_config
from vllm_gumiho.env import CHECKPOINTS
from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.request import asks_for_ours, resolve
from vllm_gumiho.request.draft_config import derive_draft_config
from vllm_gumiho.runners import wants_same_seeded_text


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gumiho"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_released(tmp_path_factory.mktemp("checkpoint"), drafter_tensors(), suffix="safetensors"))


def draft_config(spec):
    with open(os.path.join(spec["model"], "config.json")) as file:
        return json.load(file)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        (YARN, False), (YARN | {"factor": 5.12}, True), (YARN | {"rope_type": "deepseek_yarn"}, False),
        (LONGROPE | {"original_max_position_embeddings": 256}, False),
        (LONGROPE | {"original_max_position_embeddings": 512}, True),
        ({"rope_type": "dynamic", "factor": 2.0}, True), ({"rope_type": "linear", "factor": 2.0}, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_a_rope_that_ends_before_the_target_does_is_the_targets(own, kept, key, tmp_path, cache, caplog):
    """Or vLLM would cut the target's ``max_model_len``, or its draft's positions, down to the checkpoint's."""
    written = {key: own, "rope_theta": 7.0, "max_position_embeddings": 256}
    folder = write_released(tmp_path / "checkpoint", drafter_tensors(), written)
    layer = draft_config(rewritten({"model": str(folder)}))["transformer_layer_config"]
    assert layer["max_position_embeddings"] == 512
    rope = {name: layer[name] for name in ("rope_parameters", "rope_scaling", "rope_theta") if name in layer}
    assert rope == ({key: own, "rope_theta": 7.0} if kept else {"rope_parameters": ROPE})
    assert ("drafting with the target's rope" in caplog.text) == (not kept)


def test_a_target_served_past_its_own_rope_shares_it(tmp_path, cache, caplog):
    """``VLLM_ALLOW_LONG_MAX_MODEL_LEN``: nothing reaches further than what the target has."""
    folder = write_released(tmp_path / "checkpoint", drafter_tensors())
    layer = draft_config(rewritten({"model": str(folder)}, fake_target(rope_parameters=YARN)))
    assert layer["transformer_layer_config"]["rope_parameters"] == YARN
    assert "rope" not in caplog.text


@pytest.mark.parametrize(
    ("spec", "asks"),
    [
        ({"method": "gumiho"}, True), ({"method": "gumiho", "model": "x/y"}, True), ({"model": "gumiho"}, True),
        ({"method": "ngram", "model": "gumiho"}, True), ({"model": "AMD/Gumiho-vicuna-7b"}, True),
        ({"method": "eagle", "model": "amd/Gumiho-vicuna-7b"}, True), ({"model": "HERE"}, True),
        ({"method": "eagle", "model": "HERE"}, True), ({"method": "eagle3", "model": "HERE"}, False),
        ({"method": "draft_model", "model": "amd/Gumiho-vicuna-7b"}, False), ({"method": "ngram"}, False),
        ({"method": "eagle", "model": "x/y"}, False), ({"model": "/nowhere"}, False), ({"model": 3}, False),
        ({"method": "ngram", "num_speculative_tokens": 3}, False), ({}, False),
    ],
)  # fmt: skip
def test_what_asks_for_gumiho(spec, asks, checkpoint):
    spec = {key: checkpoint if value == "HERE" else value for key, value in spec.items()}
    assert asks_for_ours(spec) is asks


@pytest.mark.parametrize("method", [None, "gumiho", "eagle"])
def test_a_request_becomes_an_eagle_config_and_stays_as_the_user_wrote_it(method, checkpoint, cache):
    spec = {"model": checkpoint, "draft_sample_method": "probabilistic", "nested": {"a": [1]}, "revision": None}
    spec |= {"method": method} if method else {}
    before = copy.deepcopy(spec)
    result = rewritten(spec)
    assert spec == before
    assert result == {
        "method": "eagle",
        "model": result["model"],
        "num_speculative_tokens": 7,
        "nested": {"a": [1]},
        "draft_sample_method": "probabilistic",
    }
    config = draft_config(result)
    assert config["architectures"] == [DEFAULT.architecture]
    assert config["gumiho_checkpoint"] == os.path.realpath(checkpoint)
    assert config["transformer_layer_config"] == {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "rope_parameters": ROPE,
    }


@pytest.mark.parametrize("spec", [{"method": "gumiho"}, {"method": "gumiho", "model": "gumiho"}, {"model": "gumiho"}])
def test_without_a_model_the_checkpoint_is_found_for_the_target(spec, checkpoint, cache, monkeypatch):
    monkeypatch.setenv(CHECKPOINTS.name, json.dumps({"org/target": checkpoint}))
    assert draft_config(rewritten(spec))["gumiho_checkpoint"] == os.path.realpath(checkpoint)
    with pytest.raises(CheckpointError, match="no Gumiho checkpoint is known for target 'org/other'"):
        rewritten(spec, fake_target("org/other"))


@pytest.mark.parametrize("tokens", range(1, 8))
def test_every_draft_length_up_to_the_checkpoints_own(tokens, checkpoint, cache):
    assert rewritten({"model": checkpoint, "num_speculative_tokens": tokens})["num_speculative_tokens"] == tokens


@pytest.mark.parametrize("tokens", [0, 8, -1, True, False, "3", 2.5, 3.0, [3], float("nan")])
def test_another_draft_length_is_refused_with_what_fits(tokens, checkpoint, cache):
    with pytest.raises(CheckpointError) as error:
        rewritten({"model": checkpoint, "num_speculative_tokens": tokens})
    assert f"num_speculative_tokens={tokens!r}" in str(error.value)
    assert "give a whole number from 1 to 7" in str(error.value)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"hidden": 128}, "hidden size 64 does not fit target org/target, which has 128"),
        ({"vocab": 161}, "vocabulary of 160 tokens does not fit target org/target, which has 161"),
        ({"head_dim": 48}, "not multiples of the head dimension 48"),
        ({"head_dim": 128}, "q_proj and k_proj have 128 and 64 rows"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_target_is_refused(target, said, tmp_path, cache):
    layer = {"vocab_size": VOCAB}
    folder = write_released(tmp_path / "checkpoint", drafter_tensors(), layer)
    with pytest.raises(CheckpointError) as error:
        rewritten({"model": str(folder)}, fake_target(**target))
    assert said in str(error.value)
    assert str(folder) in str(error.value)


def test_the_checkpoints_own_layer_config_comes_before_the_targets(tmp_path, cache):
    own = {"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-4, "rope_theta": 7.0}
    folder = write_released(tmp_path / "checkpoint", drafter_tensors(), own | {"max_position_embeddings": None})
    layer = draft_config(rewritten({"model": str(folder)}))["transformer_layer_config"]
    assert own.items() <= layer.items()
    assert (layer["head_dim"], layer["max_position_embeddings"]) == (64, 512)
    assert "rope_parameters" not in layer


@pytest.mark.parametrize(
    ("spec", "parallel", "said"),
    [
        ({}, 2, r"pipeline_parallel_size=1 \(not 2\)"), ({"parallel_drafting": True}, 1, "parallel_drafting"),
        ({"method": "ngram", "model": "gumiho"}, 1, "goes with method 'gumiho', not 'ngram'"),
        ({"method": "gumiho", "model": 3}, 1, "speculative model 3 is not a path"),
        ({"method": "gumiho", "model": "/nowhere"}, 1, "/nowhere: no such file or folder"),
        ({"seeded_text": True}, 1, 'seeded_text is True, expected "same"; or leave it out'),
        ({"seeded_text": "same", "draft_sample_method": "probabilistic"}, 1, "draft_sample_method 'probabilistic'"),
        ({"seeded_text": "same", "rejection_sample_method": "block"}, 1, "rejection_sample_method 'block'"),
    ],
)  # fmt: skip
def test_what_gumiho_cannot_do_is_refused(spec, parallel, said, checkpoint, cache):
    with pytest.raises(CheckpointError, match=said):
        rewritten({"model": checkpoint} | spec, parallel=SimpleNamespace(pipeline_parallel_size=parallel))
    assert not cache.exists()


@pytest.mark.parametrize(("group", "servers"), [
    ({"nnodes": 2}, "2 nodes"), ({"distributed_executor_backend": "external_launcher"}, "the engines of a launcher"),
    ({"data_parallel_size": 4, "data_parallel_size_local": 2}, "servers of 2 among 4 ranks"),
    ({"data_parallel_size": 2, "data_parallel_size_local": 0}, "servers of 0 among 2 ranks"),
    ({"data_parallel_size": 4, "data_parallel_size_local": 4}, None),
    ({"data_parallel_size": 4, "data_parallel_size_local": 2, "data_parallel_backend": "ray"}, None),
    ({}, None),
])  # fmt: skip
def test_servers_that_would_choose_k_apart_are_refused(group, servers, checkpoint, cache):
    """vLLM's own config of the group; a number goes with any."""
    parallel = ParallelConfig()
    for name, value in group.items():
        setattr(parallel, name, value)
    spec = {"method": "gumiho", "model": str(checkpoint)}
    assert resolve(spec | {"num_speculative_tokens": 3}, fake_target(), parallel)
    if servers is None:
        assert resolve(spec | {"num_speculative_tokens": "auto"}, fake_target(), parallel).is_auto
        return
    with pytest.raises(
        CheckpointError, match=f'"auto" is chosen by each server, and {servers} of one .*give all .* one'
    ):
        resolve(spec | {"num_speculative_tokens": "auto"}, fake_target(), parallel)


@pytest.mark.parametrize("given", [{"seeded_text": "same"}, {"seeded_text": None}, {}])
def test_the_wish_for_the_same_seeded_text_goes_with_the_drafts_config(given, checkpoint, cache):
    """vLLM's own config has no such key."""
    greedy = {"draft_sample_method": "greedy", "rejection_sample_method": "standard"}
    result = rewritten({"model": checkpoint} | greedy | given)
    assert "seeded_text" not in result
    config, layer = draft_config(result), {}
    assert config.get("seeded_text") == given.get("seeded_text")
    update_draft_config(DEFAULT, config, layer)
    speculative = SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=SimpleNamespace(**layer)))
    wanted = wants_same_seeded_text(SimpleNamespace(speculative_config=speculative))
    assert wanted == (given.get("seeded_text") == "same")


def test_the_draft_config_is_published_under_its_content(checkpoint, cache):
    first = rewritten({"model": checkpoint})["model"]
    assert rewritten({"model": checkpoint, "num_speculative_tokens": 2})["model"] == first
    other = rewritten({"model": checkpoint}, fake_target(rms_norm_eps=1e-3))["model"]
    assert other != first
    assert sorted(map(str, cache.iterdir())) == sorted([first, other])
    assert os.listdir(first) == ["config.json"]


@pytest.mark.parametrize("how", ["a file is in the way", "read-only"])
def test_without_a_writable_cache_the_config_goes_to_a_temporary_folder(how, checkpoint, tmp_path, monkeypatch):
    root = tmp_path / "cache"
    if how == "read-only":
        if os.getuid() == 0:
            pytest.skip("root may write everywhere")
        root.mkdir(mode=0o500)
    else:
        root.write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(root))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    spec = rewritten({"model": checkpoint})
    assert spec["model"].startswith(str(tmp_path / "temporary"))
    assert draft_config(spec)["architectures"] == [DEFAULT.architecture]
    monkeypatch.setattr(tempfile, "tempdir", str(root / "absent"))
    if how != "read-only":
        with pytest.raises(CheckpointError, match="set VLLM_CACHE_ROOT to a writable folder"):
            rewritten({"model": checkpoint})


def test_the_load_format_is_ours_unless_weights_are_dummies(checkpoint, cache):
    pytest.importorskip("vllm.config")
    spec = rewritten({"model": checkpoint}, load_format="auto")
    assert spec["draft_load_config"].load_format == "gumiho"
    assert "draft_load_config" not in rewritten({"model": checkpoint})


@pytest.mark.parametrize("key", ["num_serial_steps", "num_parallel_heads", "fc_bias"])
def test_the_speculators_hook_copies_what_the_model_reads(key):
    given_config = {"num_serial_steps": 2, "num_parallel_heads": 5, "fc_bias": True, "gumiho_checkpoint": "/c"}
    layer = {"hidden_size": 64}
    update_draft_config(DEFAULT, config_dict=given_config, pre_trained_config=layer)
    assert layer == {"hidden_size": 64, "architectures": [DEFAULT.architecture]} | given_config
    del given_config[key]
    with pytest.raises(CheckpointError, match=key):
        update_draft_config(DEFAULT, given_config, {})


@pytest.mark.parametrize(
    ("architectures", "expected"), [([DEFAULT.architecture], DEFAULT), (["Eagle"], None), (None, None)]
)
def test_an_engine_configs_drafter_is_known_by_its_draft_architecture(architectures, expected):
    draft = SimpleNamespace(hf_config=SimpleNamespace(architectures=architectures))
    assert drafter_of(SimpleNamespace(speculative_config=SimpleNamespace(draft_model_config=draft))) is expected
    assert drafter_of(SimpleNamespace(speculative_config=None)) is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutable") / "head"
    return save_speculators(folder, drafter_tensors(), "org/target", LAYER | {"rope_parameters": ROPE})


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=3),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@st.composite
def damaged(draw, config):
    config = copy.deepcopy(config)
    for _ in range(draw(st.integers(1, 3))):
        place = config
        key = draw(st.sampled_from(sorted(place)))
        while isinstance(place[key], dict) and place[key] and draw(st.booleans()):
            place = place[key]
            key = draw(st.sampled_from(sorted(place)))
        if draw(st.booleans()):
            del place[key]
        else:
            place[key] = draw(JUNK)
        if not config:
            break
    return config


@settings(max_examples=400, deadline=None)
@given(data=st.data(), layout=st.sampled_from(["released", "speculators"]))
def test_a_damaged_config_is_refused_or_does_not_matter(saved, data, layout):
    whole = target_config() if layout == "released" else saved.config
    (saved.path / "config.json").write_text(json.dumps(data.draw(damaged(whole))))
    try:
        opened = open_checkpoint(saved.path)
        config = derive_draft_config(opened, fake_target())
    except CheckpointError:
        return
    assert opened.sizes == saved.sizes
    assert opened.verifier is None or isinstance(opened.verifier, str)
    layer = json.loads(json.dumps(config))["transformer_layer_config"]
    assert layer["num_attention_heads"] * layer["head_dim"] == saved.sizes.query_size
    assert layer["num_key_value_heads"] * layer["head_dim"] == saved.sizes.key_size
    assert (layer["hidden_size"], layer["intermediate_size"], layer["vocab_size"]) == (HIDDEN, 48, VOCAB)
    assert layer["hidden_act"] == "silu"
    assert layer["rms_norm_eps"] > 0
    assert layer["max_position_embeddings"] >= 1
    assert isinstance(layer.get("rope_parameters", {}), dict)
    assert (config["num_serial_steps"], config["num_parallel_heads"]) == (2, 5)
