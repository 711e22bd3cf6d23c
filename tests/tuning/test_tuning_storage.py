"""Schedules on disk, "auto" in a speculative config, and the arguments of `vllm-gumiho tune`."""

from __future__ import annotations

import json
import logging
import os
import sys
from types import SimpleNamespace

import pytest
from fakes import fake_target, measurement, rewritten
from tiny import drafter_tensors, write_released
from typer.testing import CliRunner

from vllm_gumiho.cli import app
from vllm_gumiho.env import SCHEDULE
from vllm_gumiho.errors import CheckpointError, EngineError, FigureError, StorageError, TuningError
from vllm_gumiho.request import resolve
from vllm_gumiho.tuning import auto, storage, tasks, verify
from vllm_gumiho.tuning.engine import MeasuringEngine
from vllm_gumiho.tuning.measure import engine_settings, record_of
from vllm_gumiho.tuning.plot import plot_curve
from vllm_gumiho.tuning.settings import Plan


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.delenv(SCHEDULE.name, raising=False)
    return tmp_path / "cache" / "gumiho" / "schedules"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("checkpoint"), drafter_tensors(), suffix="safetensors")


def fake_engine(**changes) -> SimpleNamespace:
    settings = {"kv_cache_dtype": "auto", "enforce_eager": True, "tensor_parallel_size": 1, "max_num_seqs": 2}
    return SimpleNamespace(**{"load_format": "auto"} | settings | changes)


def target(**changes) -> SimpleNamespace:
    found = fake_target(**changes)
    found.dtype, found.quantization, found.max_model_len = "torch.float32", None, 512
    return found


def spec_for(checkpoint, **more) -> dict:
    return {"method": "gumiho", "model": str(checkpoint), "num_speculative_tokens": "auto", **more}


def identity(checkpoint, engine=None, pair=None, spec=None) -> dict:
    pair = pair or target()
    return storage.identity(resolve(spec or spec_for(checkpoint), pair), engine or fake_engine(), pair)


def stored(checkpoint, **changes) -> dict:
    """A record for the pair, saved."""
    key = identity(checkpoint)
    record = record_of(key, measurement(), 1, Plan(max_batch=2)) | changes
    storage.save(record)
    return record


def settle(checkpoint, data_parallel: int = 1, max_num_seqs: int | None = 2, **more):
    parallel = SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=data_parallel)
    request = resolve(spec_for(checkpoint, **more), target(), parallel)
    settled = auto.settle(request, fake_engine(max_num_seqs=max_num_seqs), target(), parallel)
    return settled and settled.spec


def test_a_stored_schedule_becomes_the_config_and_one_line_of_the_log(checkpoint, cache, caplog):
    record = stored(checkpoint, most=7, schedule=[[1, 2, 5], [3, 4, 2], [5, 9, 0]])
    with caplog.at_level(logging.INFO, "vllm.vllm_gumiho"):
        spec = settle(checkpoint)
    assert spec == spec_for(checkpoint) | {
        "num_speculative_tokens": 5, "num_speculative_tokens_per_batch_size": record["schedule"],
    }  # fmt: skip
    assert [r.message for r in caplog.records if "K=5 at batch size 1 to 2" in r.message]
    assert os.listdir(cache) == [storage.path_of(record["key"]).name]


def test_a_stored_no_starts_without_speculation_and_says_why(checkpoint, cache, caplog):
    stored(checkpoint, schedule=None, single=0, reason="drafting pays at no batch size")
    with caplog.at_level(logging.INFO, "vllm.vllm_gumiho"):
        assert settle(checkpoint) is None
    assert [r.message for r in caplog.records] == [
        "Gumiho: the engine starts without speculation, by measurement on this machine (drafting pays at no batch size)"
    ]


@pytest.mark.parametrize(("single", "expected"), [(4, {"num_speculative_tokens": 4}), (0, None)])
def test_data_parallel_engines_get_one_length_or_none(checkpoint, cache, single, expected):
    stored(checkpoint, most=7, schedule=[[1, 2, 7], [3, 3, 0]], single=single)
    spec = settle(checkpoint, data_parallel=2)
    assert spec == (expected and spec_for(checkpoint) | expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": {"enforce_eager": False}}, {"engine": {"tensor_parallel_size": 2}},
        {"engine": {"max_num_seqs": 1}}, {"engine": {"max_num_seqs": 16}}, {"engine": {"max_num_seqs": None}},
        {"target": {"model": "org/other"}},
        {"spec": {"draft_sample_method": "probabilistic"}},
        {"environment": "1"},
    ],
)  # fmt: skip
def test_another_setting_is_another_schedule(checkpoint, cache, monkeypatch, changes):
    record = stored(checkpoint)
    spec = spec_for(checkpoint, **changes.get("spec", {}))
    if "environment" in changes:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", changes["environment"])
    key = identity(checkpoint, fake_engine(**changes.get("engine", {})), target(**changes.get("target", {})), spec)
    assert storage.path_of(key) != storage.path_of(record["key"])
    assert storage.load(key) is None


def test_servers_that_may_decode_more_than_is_measured_share_a_schedule():
    assert [storage.largest_batch(fake_engine(max_num_seqs=most)) for most in (1, 15, 16, 17, 256, None)] == [
        1, 15, 16, 16, 16, 16,
    ]  # fmt: skip


@pytest.mark.parametrize(("max_num_seqs", "drafts"), [(16, True), (17, False), (None, False)])
def test_more_requests_than_measured_turn_off_a_drafter_that_is_dear_when_idle(
    checkpoint, cache, caplog, max_num_seqs, drafts
):
    """Twice as fast at 1 and 16, but 12 % behind where nothing is drafted, as above 16."""
    times = {"1": [10.0], "16": [10.0]}
    found = measurement() | {
        "off_ms": times, "on_ms": {"0": {"1": [11.4], "16": [11.4]}, "1": {"1": [11.5], "16": [11.5]}},
        "accepted": [200],
    }  # fmt: skip
    key = identity(checkpoint, fake_engine(max_num_seqs=16))
    record = record_of(key, found, 1, Plan(max_batch=16))
    assert record["schedule"] == [[1, 16, 1], [17, 17, 0]]
    storage.save(record)
    with caplog.at_level(logging.INFO, "vllm.vllm_gumiho"):
        assert (settle(checkpoint, max_num_seqs=max_num_seqs) is not None) is drafts
    assert ("more than 16 requests at once would be slower with it (0.88x expected with K=0 at 16" in caplog.text) is (
        not drafts
    )


def test_a_changed_checkpoint_is_another_schedule(tmp_path, cache):
    tensors = drafter_tensors()
    folder = write_released(tmp_path / "checkpoint", tensors, suffix="safetensors")
    before = identity(folder)
    assert identity(folder, spec={"model": str(folder)}) == before
    write_released(folder, tensors | {"fc.bias": tensors["fc.bias"] + 1}, suffix="safetensors")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert identity(folder) != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "", lambda text: text[: len(text) // 2], lambda text: "[" * 100_000, lambda text: "[]",
        lambda text: text.replace('"format": 2', '"format": 1'), lambda text: text.replace('"most": 1', '"most": "x"'),
        lambda text: text.replace('"single": ', '"single": 9'),
        lambda text: text.replace('"schedule": [', '"schedule": [0,'),
        lambda text: text.replace('"above": null', '"above": 1'),
        lambda text: text.replace('"key"', '"yek"'), lambda text: text.replace('"dtype": "float32"', '"dtype": "half"'),
    ],
)  # fmt: skip
def test_a_damaged_file_is_ignored_with_a_warning(checkpoint, cache, caplog, damage):
    record = stored(checkpoint)
    file = storage.path_of(record["key"])
    text = file.read_text()
    assert storage.load(record["key"]) == record
    assert damage(text) != text
    file.write_text(damage(text))
    assert storage.load(record["key"]) is None
    assert [r.levelname for r in caplog.records if str(file) in r.message] == ["WARNING"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, checkpoint):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"file/gumiho/schedules.*set VLLM_CACHE_ROOT") as refused:
        storage.writable_folder()
    with pytest.raises(StorageError, match="set VLLM_CACHE_ROOT"):
        stored(checkpoint)
    assert "\n" not in str(refused.value)


def test_a_record_handed_down_in_the_environment_serves_without_a_folder(checkpoint, cache, monkeypatch, caplog):
    record = stored(checkpoint)
    storage.path_of(record["key"]).unlink()
    monkeypatch.setenv(SCHEDULE.name, json.dumps(record))
    assert storage.load(record["key"]) == record
    assert storage.load(record["key"] | {"cores": -1}) is None
    monkeypatch.setenv(SCHEDULE.name, "{")
    assert storage.load(record["key"]) is None
    assert SCHEDULE.name in caplog.text


def test_an_unfinished_write_leaves_the_old_record(checkpoint, cache, monkeypatch):
    record = stored(checkpoint)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="No space left on device"):
        storage.save(record | {"single": 1})
    assert storage.load(record["key"]) == record
    assert len(os.listdir(cache)) == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"num_speculative_tokens_per_batch_size": [[1, 2, 3]]}, "say the same twice"),
        ({"model": "/nowhere"}, "/nowhere"),
        ({"parallel_drafting": True}, "parallel_drafting"),
    ],
)
def test_a_bad_config_is_refused_before_anything_is_measured(checkpoint, cache, more, words):
    with pytest.raises(CheckpointError, match=words):
        settle(checkpoint, **more)
    assert not cache.exists()


def test_a_checkpoint_of_another_target_is_refused_before_anything_is_measured(checkpoint, cache):
    with pytest.raises(CheckpointError, match="trained for this target"):
        resolve(spec_for(checkpoint), target(hidden=128))
    assert not cache.exists()


def test_a_damaged_checkpoint_is_refused_before_anything_is_measured(tmp_path, cache):
    tensors = drafter_tensors()
    tensors["fc.weight"][0, 0] = float("nan")
    damaged = write_released(tmp_path / "nan", tensors, suffix="safetensors")
    with pytest.raises(CheckpointError, match=r"fc\.weight"):
        settle(damaged)
    assert not cache.exists()


def test_the_measuring_engine_has_the_users_settings():
    engine = fake_engine(dtype="float32", quantization=None, trust_remote_code=True, hf_overrides={"a": 1}, seed=3)
    settings = engine_settings(engine, target(), 4)
    assert settings == {
        "model": "org/target", "dtype": "float32", "trust_remote_code": True, "hf_overrides": {"a": 1},
        "kv_cache_dtype": "auto", "load_format": "auto", "enforce_eager": True, "tensor_parallel_size": 1,
        "max_model_len": 512, "max_num_seqs": 4, "enable_prefix_caching": False, "disable_log_stats": False,
    }  # fmt: skip


def test_a_measuring_process_that_fails_is_a_warning_and_no_speculation(checkpoint, cache, caplog, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert settle(checkpoint) is None
    assert (
        "no schedule could be measured (the measuring engine failed: exit code 1, last line: no output)" in caplog.text
    )
    assert "the engine starts without speculation" in caplog.text
    assert not list(cache.glob("*.json"))


@pytest.mark.parametrize(
    ("share", "reason"),
    [
        (1.3, "1.30x at 1, 1.30x at 2 measured"),
        (0.9, "the best measured is 0.90x at 1"),
        (None, "not be verified: why"),
    ],
)
def test_auto_keeps_what_real_requests_bear_out(checkpoint, cache, monkeypatch, share, reason):
    """Measurements are planted: drafting pays by step times, and real requests run at ``share`` of no speculation."""

    def curve(settings, configs, plan, *rest):
        assert list(configs) == ["off", "schedule"]
        if share is None:
            raise TuningError("why")
        return {name: {"1": [speed] * plan.rounds, "2": [speed] * plan.rounds} for name, speed in
                (("off", 10.0), ("schedule", 10.0 * share))}  # fmt: skip

    monkeypatch.setattr(auto, "measure", lambda *given: measurement(one=(10.3, 12.0)))
    monkeypatch.setattr(verify, "measure_curve", curve)
    spec = settle(checkpoint)
    record = json.loads(next(cache.glob("*.json")).read_text())
    assert record["reason"].endswith(reason)
    if share == 1.3:
        assert spec["num_speculative_tokens_per_batch_size"] == record["schedule"] == [[1, 2, 1], [3, 3, 0]]
    else:
        assert (spec, record["schedule"], record["single"]) == (None, None, 0)
        assert record["withdrawn"] == [[1, 2, 1], [3, 3, 0]]


@pytest.mark.parametrize(("batch", "a_step"), [(1, 1), (3, 1), (4, 3), (7, 2)])
def test_a_steady_load_is_timed_while_it_is_steady(monkeypatch, batch, a_step):
    """An engine whose clock ticks once a step and that gives each request ``a_step`` tokens."""
    running: dict[str, list[int]] = {}
    at_once, given = [], []

    def step() -> list:
        at_once.append(len(running))
        outputs = []
        for name, (length, tokens) in list(running.items()):
            new = min(a_step, length - tokens)
            given.append((len(at_once), new))
            running[name][1] += new
            finished = tokens + new == length
            outputs.append(output(name, tokens + new, finished))
            if finished:
                del running[name]
        return outputs

    def output(name: str, tokens: int, finished: bool) -> SimpleNamespace:
        return SimpleNamespace(request_id=name, finished=finished, outputs=[SimpleNamespace(token_ids=[0] * tokens)])

    def add_request(name, prompt, sampling) -> None:
        running[name] = [sampling.max_tokens, 0]

    monkeypatch.setattr(tasks, "question_ids", lambda tokenizer: [[1], [2], [3]])
    monkeypatch.setattr(tasks.time, "perf_counter", lambda: float(len(at_once)))
    engine = SimpleNamespace(step=step, add_request=add_request, has_unfinished_requests=lambda: bool(running))
    llm = SimpleNamespace(llm_engine=engine, get_tokenizer=lambda: None)
    found = tasks.throughput(llm, batch, 8)
    steady = at_once.index(batch - 1) if batch > 1 else len(at_once)
    assert set(at_once[:steady]) == {batch}
    assert found == pytest.approx(sum(new for number, new in given if number <= steady) / steady)
    assert sum(new for _, new in given) == pytest.approx(8 * max(3 * batch, 3), rel=0.1)
    assert not running


def test_a_measuring_process_that_takes_too_long_is_stopped():
    engine = MeasuringEngine({}, limit_s=0.0)
    with pytest.raises(EngineError, match="more than 0 s and was stopped"):
        engine.__enter__()
    assert engine._process.poll() is not None


def test_a_vllm_that_gives_no_threads_is_a_warning_and_no_speculation(checkpoint, cache, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.utils.ompmultiprocessing", None)
    assert settle(checkpoint) is None
    assert "vLLM gives no threads to a worker here: import of vllm.utils.ompmultiprocessing" in caplog.text


def test_rewriting_alone_names_auto_in_its_refusal(checkpoint, cache):
    with pytest.raises(CheckpointError, match='from 1 to 7, or "auto"'):
        rewritten(spec_for(checkpoint, num_speculative_tokens=0), target())


def test_the_curve_is_plotted(tmp_path):
    curve = {name: {"1": [1.0, 2.0], "2": [3.0]} for name in ("off", "K=7", "auto")}
    plot_curve(curve, "title", tmp_path / "new" / "curve.png")
    assert (tmp_path / "new" / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(FigureError, match="give another path"):
        plot_curve(curve, "title", tmp_path / "file" / "curve.png")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--concurrency", "0"], "--concurrency 0: give a number above 0"),
        (["--repeats", "-1"], "--repeats -1: give a number above 0"),
        (["--curve", "x.png", "--no-verify"], "--curve shows what verification measures"),
    ],
)
def test_tune_refuses_bad_arguments_before_it_starts_an_engine(arguments, words, cache):
    done = CliRunner().invoke(app, ["tune", "--target", "/nowhere", *arguments])
    assert isinstance(done.exception, TuningError)
    assert words in str(done.exception)


def test_tune_asks_for_a_writable_folder_before_it_measures(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "file"))
    done = CliRunner().invoke(app, ["tune", "--target", "/nowhere"])
    assert isinstance(done.exception, StorageError)
