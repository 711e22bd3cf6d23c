"""Schedules in real engines: K that changes from step to step, and "auto" from measurement to engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from engines import case, environment, run_engines
from fakes import measurement
from places import PROCESSES

from vllm_gumiho.errors import EngineError
from vllm_gumiho.request import resolve
from vllm_gumiho.tuning import storage
from vllm_gumiho.tuning.engine import MeasuringEngine
from vllm_gumiho.tuning.measure import EACH, ONE, TOGETHER, measure
from vllm_gumiho.tuning.settings import Plan
from vllm_gumiho.tuning.verify import verified

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.long)])
def test_text_stays_as_requests_join_and_leave_across_the_borders(runner, tmp_path, tiny_target, tiny_checkpoint):
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(PROCESSES / "schedule_main.py"), runner, tiny_target, tiny_checkpoint, out],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment(),
    )
    assert out.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["runner"] == runner
    assert result["on"] == result["off"]
    assert [len(tokens) for tokens in result["on"]] == result["max_tokens"] == [60, 44, 26, 14, 20]
    steps = result["steps"]
    assert {step["running"] for step in steps} >= {1, 2, 3, 4, 5}
    assert {step["length"] for step in steps if step["running"] == 1} >= {7, 0}
    assert {step["length"] for step in steps} >= {7, 3, 1, 0}


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def spoken_target(tmp_path_factory) -> Path:
    """A tiny target with a tokenizer, which measuring asks its questions through."""
    target = tiny.write_target(tmp_path_factory.mktemp("target"))
    write_tokenizer(target)
    return target


def auto(target: Path, checkpoint: Path, **more) -> dict:
    gumiho = {"method": "gumiho", "model": str(checkpoint), "num_speculative_tokens": "auto", **more}
    return case(target, gumiho, max_num_seqs=2)


def test_a_measuring_engine_answers(spoken_target, tiny_checkpoint):
    speculative = {
        "method": "gumiho",
        "model": str(tiny_checkpoint),
        "num_speculative_tokens_per_batch_size": [[1, 2, 7]],
    }
    settings = {
        "model": str(spoken_target),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 2,
        "disable_log_stats": False,
        "speculative_config": speculative,
    }
    with MeasuringEngine(settings) as engine:
        assert (engine.started["model_runner"], engine.started["draft_length"]) == ("V1", 7)
        accepted = engine.ask("acceptance", tokens=8)
        assert accepted["drafts"] >= len(accepted["accepted"]) == 7
        for length in (0, 3, 7):
            assert engine.ask("step", batch=2, length=length, switch=True, seconds=0.01) > 0
        assert engine.ask("throughput", batch=2, tokens=4) > 0
        with pytest.raises(EngineError, match=r"drafted 7\.00 tokens a step where 3 were set"):
            engine.ask("step", batch=1, length=3, switch=False, seconds=0.01)


@pytest.mark.long
def test_real_requests_meet_a_schedule_in_turn_with_no_speculation(monkeypatch, spoken_target, tiny_checkpoint):
    """A tiny target never gets ten times as fast by drafts: the planted schedule is taken back."""
    started: list[MeasuringEngine] = []

    class Watched(MeasuringEngine):
        def __enter__(self):
            started.append(self)
            return super().__enter__()

    monkeypatch.setattr("vllm_gumiho.tuning.verify.MeasuringEngine", Watched)
    settings = {
        "model": str(spoken_target),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 2,
        "disable_log_stats": False,
    }
    record = {
        "most": 7,
        "schedule": [[1, 1, 5], [2, 3, 0]],
        "single": 7,
        "reason": "planted",
        "above": None,
        "row_cost": 0.05,
        "measurement": measurement(one=(10.3, 12.0)),
    }
    plan = Plan(max_batch=2, rounds=2, answer_tokens=4, max_loss=-9.0)
    speculative = {"method": "gumiho", "model": str(tiny_checkpoint)}
    found = verified(record, settings, speculative, plan, TOGETHER, lambda line: None)
    assert {name: {size: len(runs) for size, runs in line.items()} for name, line in found["verified"].items()} == {
        "off": {"1": 2, "2": 2},
        "schedule": {"1": 2, "2": 2},
        "confident": {"1": 2, "2": 2},
    }
    assert all(speed > 0 for line in found["verified"].values() for runs in line.values() for speed in runs)
    assert (found["schedule"], found["withdrawn"]) == (None, record["schedule"])
    assert "measured" in found["reason"]
    off, on, by_request = started
    assert (off.settings["speculative_config"], off.started["draft_length"], off.serving) == (None, 0, True)
    assert on.settings["speculative_config"]["num_speculative_tokens_per_batch_size"] == record["schedule"]
    assert (on.started["draft_length"], on.serving) == (5, True)
    assert by_request.settings["speculative_config"]["num_speculative_tokens_per_request"] == 0.05


@pytest.fixture(scope="module")
def planted(tmp_path_factory, tiny_target, tiny_checkpoint):
    """Engines started with "auto" on schedules that are in the cache."""
    from vllm.engine.arg_utils import EngineArgs

    cache = tmp_path_factory.mktemp("cache")
    engine = EngineArgs(
        model=str(tiny_target),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(cache))
        for spec, schedule in (({}, [[1, 1, 5], [2, 2, 0]]), ({"draft_sample_method": "probabilistic"}, None)):
            model = engine.create_model_config()
            request = resolve({"model": str(tiny_checkpoint), **spec}, model)
            key = storage.identity(request, engine, model)
            storage.save(
                {
                    "format": storage.FORMAT,
                    "key": key,
                    "most": 7,
                    "single": 0,
                    "reason": "planted",
                    "schedule": schedule,
                }
            )
    cases = {
        "off": case(tiny_target, max_num_seqs=2),
        "schedule": auto(tiny_target, tiny_checkpoint),
        "none": auto(tiny_target, tiny_checkpoint, draft_sample_method="probabilistic"),
    }
    return run_engines(tmp_path_factory.mktemp("auto"), "v1", cases, {"VLLM_CACHE_ROOT": str(cache)})


def test_auto_drafts_by_the_stored_schedule(planted):
    result = planted["schedule"]
    assert (result["drafter"], result["k"]) == ("GumihoProposer", 5)
    assert result["drafted"] == 5 * result["drafts"] > 0
    assert "K=5 at batch size 1, K=0 at batch size 2 and above" in result["log"]
    assert "measuring" not in result["log"]


def test_auto_starts_without_speculation_where_it_never_pays(planted):
    result = planted["none"]
    assert (result["drafter"], result["k"]) == ("NoneType", None)
    assert "starts without speculation, by measurement on this machine (planted)" in result["log"]


@pytest.mark.parametrize("name", ["schedule", "none"])
def test_auto_keeps_the_text(planted, name):
    assert planted[name]["tokens"] == planted["off"]["tokens"]


@pytest.mark.long
@pytest.mark.parametrize("mode", [TOGETHER, ONE, EACH])
def test_every_cell_is_measured_as_often_as_asked(mode, spoken_target, tiny_checkpoint):
    settings = {
        "model": str(spoken_target),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 2,
        "disable_log_stats": False,
    }
    plan = Plan(max_batch=2, repeats=2, seconds=0.01, tokens=8)
    found = measure(settings, {"method": "gumiho", "model": str(tiny_checkpoint)}, 2, plan, mode, lambda line: None)
    assert set(found["on_ms"]) == {"0", "1", "2"}
    for row in (found["off_ms"], *found["on_ms"].values()):
        assert {batch: len(times) for batch, times in row.items()} == {"1": 2, "2": 2}
    assert found["drafts"] >= found["accepted"][0] >= found["accepted"][1]
    assert (found["runner"], found["mode"]) == ("V1", mode)


@pytest.mark.long
def test_auto_measures_once_and_stores_what_it_found(tmp_path, spoken_target, tiny_checkpoint):
    cases = {name: auto(spoken_target, tiny_checkpoint) for name in ("first", "second")}
    results = run_engines(tmp_path, "v1", cases, {"VLLM_CACHE_ROOT": str(tmp_path / "cache")})
    (file,) = (tmp_path / "cache" / "gumiho" / "schedules").glob("*.json")
    record = storage.checked(json.loads(file.read_text()))
    times = record["measurement"]
    assert set(times["on_ms"]) == {str(k) for k in range(8)}
    assert all(set(row) == {"1", "2"} for row in (times["off_ms"], *times["on_ms"].values()))
    assert sorted(times["accepted"], reverse=True) == times["accepted"]
    assert results["first"]["log"].count("no schedule is stored for this pair on this machine; measuring") == 1
    assert f"kept in {file}" in results["first"]["log"]
    drafter = "GumihoProposer" if record["schedule"] else "NoneType"
    assert [results[name]["drafter"] for name in cases] == [drafter, drafter]
    assert results["first"]["tokens"] == results["second"]["tokens"]
