"""What `auto` and `vllm-gumiho tune` refuse or measure before a server starts."""

from __future__ import annotations

import json
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from fakes import measurement, rewritten
from filelock import FileLock
from schedules import fake_engine, identity, settle, spec_for, stored, target
from tiny import drafter_tensors, write_released
from typer.testing import CliRunner
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from vllm_gumiho.cli import app
from vllm_gumiho.drafters import PER_REQUEST
from vllm_gumiho.errors import CheckpointError, EngineError, FigureError, StorageError, TuningError
from vllm_gumiho.request import resolve
from vllm_gumiho.request.lengths import SCHEDULE, schedule_problem
from vllm_gumiho.tuning import auto, measure, storage, tasks, verify
from vllm_gumiho.tuning.engine import MeasuringEngine
from vllm_gumiho.tuning.measure import costs_of, engine_settings, record_of
from vllm_gumiho.tuning.plot import plot_curve
from vllm_gumiho.tuning.schedule import loss_above
from vllm_gumiho.tuning.settings import Plan
from vllm_gumiho.tuning.storage import path_of, writable_folder


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
        "model": "org/target",
        "dtype": "float32",
        "trust_remote_code": True,
        "hf_overrides": {"a": 1},
        "kv_cache_dtype": "auto",
        "load_format": "auto",
        "enforce_eager": True,
        "tensor_parallel_size": 1,
        "max_model_len": 512,
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }


def test_a_measuring_process_that_fails_is_a_warning_and_no_speculation(checkpoint, cache, caplog, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert settle(checkpoint) is None
    assert (
        "no schedule could be measured (the measuring engine failed: exit code 1, last line: no output)" in caplog.text
    )
    assert "the engine starts without speculation. The next start tries again" in caplog.text
    assert not list(cache.glob("*.json"))
    # API servers make the config again, beside the engine: they are told.
    caplog.set_level(logging.INFO, "vllm.vllm_gumiho")
    with monkeypatch.context() as child:
        child.setattr(storage.os, "getpid", lambda: -1)
        child.setattr(auto, "measure", lambda *given: pytest.fail("measured again"))
        assert settle(checkpoint) is None
        assert "by measurement on this machine (nothing was measured: the measuring engine failed" in caplog.text
        record = stored(checkpoint)
        assert settle(checkpoint)["num_speculative_tokens_per_batch_size"] == record["schedule"]
        path_of(record["key"]).unlink()
    # Who failed may try again.
    monkeypatch.setattr(auto, "measure", lambda *given: measurement(one=(10.3, 12.0)))
    monkeypatch.setattr(auto, "verified", lambda record, *given: record)
    assert settle(checkpoint)["num_speculative_tokens_per_batch_size"] == [[1, 2, 1], [3, 3, 0]]


def test_a_server_that_waits_for_anothers_measurement_says_so(checkpoint, cache, caplog):
    caplog.set_level(logging.INFO, "vllm.vllm_gumiho")
    key = identity(checkpoint)
    with ThreadPoolExecutor(1) as pool, FileLock(writable_folder() / f".{path_of(key).name}.lock"):
        waits = pool.submit(settle, checkpoint)
        while "waiting for another process, which measures this pair" not in caplog.text:
            time.sleep(0.01)
            assert not waits.done()
        record = stored(checkpoint)
    assert waits.result()["num_speculative_tokens_per_batch_size"] == record["schedule"]


@pytest.mark.parametrize(
    ("share", "confident", "reason"),
    [
        (1.3, 1.2, "1.30x at 1, 1.30x at 2 measured"),
        (1.3, 1.4, "drafts of a length by request: 1.40x at 1, 1.40x at 2 measured"),
        (0.9, 1.1, "drafts of a length by request: 1.10x at 1, 1.10x at 2 measured"),
        (0.9, 1.02, "the best measured is 0.90x at 1"),
        (None, None, "not be verified: why"),
    ],
)
def test_auto_keeps_what_real_requests_bear_out(checkpoint, cache, monkeypatch, share, confident, reason):
    """Measurements are planted: drafting pays by step times, and real requests run at ``share`` of no speculation."""

    def curve(settings, configs, plan, *rest):
        assert list(configs) == ["off", "schedule", "confident"]
        assert configs["confident"] | {PER_REQUEST: None} == configs["schedule"] | {PER_REQUEST: None}
        if share is None:
            raise TuningError("why")
        return {
            name: {"1": [speed] * plan.rounds, "2": [speed] * plan.rounds}
            for name, speed in (("off", 10.0), ("schedule", 10.0 * share), ("confident", 10.0 * confident))
        }

    monkeypatch.setattr(auto, "measure", lambda *given: measurement(one=(10.3, 12.0)))
    monkeypatch.setattr(verify, "measure_curve", curve)
    spec = settle(checkpoint)
    record = json.loads(next(cache.glob("*.json")).read_text())
    assert record["reason"].endswith(reason)
    by_request = reason.startswith("drafts")
    assert record.get("per_request") == (record["row_cost"] if by_request else None)
    assert record["above"] is None
    if share == 1.3 or by_request:
        assert spec["num_speculative_tokens_per_batch_size"] == record["schedule"] == [[1, 2, 1], [3, 3, 0]]
        applied = auto.apply(record, resolve(spec_for(checkpoint), target()), 1, 2)
        assert applied.draft_config.get(PER_REQUEST) == record.get("per_request")
    else:
        assert (spec, record["schedule"], record["single"]) == (None, None, 0)
        assert record["withdrawn"] == [[1, 2, 1], [3, 3, 0]]


@pytest.mark.parametrize(("mode", "groups"), [
    (measure.TOGETHER, [[0, 1, 2, 3]]), (measure.ONE, [[0, 1, 2, 3]]), (measure.EACH, [[0], [1], [2], [3]]),
])  # fmt: skip
def test_an_engine_is_started_with_every_length_that_it_is_measured_at(monkeypatch, mode, groups):
    """Kernels are chosen at load for the lengths of a schedule; the longest is drafted at every measured batch size."""
    started = []

    class Engine:
        def __init__(self, arguments, limit_s):
            started.append(arguments.get("speculative_config"))
            self.started = {"model_runner": "V1"}

        __enter__, __exit__ = lambda self: self, lambda self, *error: None

        def ask(self, do, **given):
            return {"drafts": 1, "accepted": [1, 1, 1]} if do == "acceptance" else 1.0

    monkeypatch.setattr(measure, "MeasuringEngine", Engine)
    plan = Plan(max_batch=4, repeats=1)
    measure.measure({}, {"method": "gumiho"}, 3, plan, mode, lambda line: None)
    schedules = [config[SCHEDULE] for config in started if config]
    assert [sorted(length for *_, length in schedule) for schedule in schedules] == groups
    for schedule, group in zip(schedules, groups, strict=True):
        assert build_dynamic_sd_schedule_lookup(schedule, 4, 3)[1:] == [group[-1]] * 4
        assert schedule_problem(schedule, 3) is None


def test_drafts_by_request_keep_the_bound_above_what_was_measured():
    """With K=0 the drafter loses 10 % at two requests: a server that may decode three does not draft at all."""
    record = record_of({}, measurement(idle=(10.1, 11.2), one=(10.3, 12.0)), 1, Plan(max_batch=2))
    curve = {name: {"1": [speed], "2": [speed]} for name, speed in (("off", 10.0), ("confident", 14.0))}
    above = loss_above(costs_of(record["measurement"]), 0.05)
    assert above == record["above"] == "0.89x expected with K=0 at 2, under 0.95x"
    kept = verify.judged(record | {"schedule": None}, curve, Plan(max_batch=2), [[1, 2, 1], [3, 3, 0]], above)
    assert (kept["per_request"], kept["above"]) == (record["row_cost"], above)


def test_verification_hands_that_bound_on(monkeypatch):
    record = record_of({}, measurement(idle=(10.1, 11.2), one=(10.3, 12.0)), 1, Plan(max_batch=2))
    curve = {
        name: {"1": [speed], "2": [speed]} for name, speed in (("off", 10.0), ("schedule", 9.0), ("confident", 14.0))
    }
    monkeypatch.setattr(verify, "measure_curve", lambda *given: curve)
    found = verify.verified(record, {}, {}, Plan(max_batch=2), "together", print)
    assert found["reason"].startswith("drafts of a length by request")
    assert found["above"] == "0.89x expected with K=0 at 2, under 0.95x"


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
