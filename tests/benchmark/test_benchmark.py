"""The benchmark's grid, store, summary, table and plots; no engine.  (The engines: test_benchmark_engine.py.)"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vllm_gumiho.benchmark import served
from vllm_gumiho.benchmark.grid import Grid, Variant, make_grid
from vllm_gumiho.benchmark.plots import plot_all
from vllm_gumiho.benchmark.report import show, summarise
from vllm_gumiho.benchmark.settings import Settings
from vllm_gumiho.benchmark.shapes import EAGLE_RATES, GUMIHO_RATES, SHAPES, drafter_sizes, variants, write_models
from vllm_gumiho.benchmark.store import Store
from vllm_gumiho.drafters.checkpoints import open_checkpoint
from vllm_gumiho.drafters.gumiho.layout import tensor_shapes
from vllm_gumiho.errors import BenchError, CheckpointError

OFF, NGRAM, GUMIHO = Variant("none"), Variant("ngram", 2, {}), Variant("gumiho", 3, {})


def grid(**changes) -> Grid:
    return Grid("target", (OFF, NGRAM, GUMIHO), (), (), **({"concurrency": (1, 4), "repeats": 3} | changes))


def cell(variant: Variant, speed: float, repeat: int = 0, concurrency: int = 1, mode: str = "offline", **more) -> dict:
    drafts = 10 if variant.length else 0
    positions = [0.5**i for i in range(1, variant.length + 1)]
    return {
        "mode": mode,
        "label": variant.label,
        "method": variant.method,
        "num_speculative_tokens": variant.length,
        "concurrency": concurrency,
        "repeat": repeat,
        "status": "ok",
        "output_tokens_per_s": speed,
        "tpot_ms": {"p50": 10.0, "p95": 20.0},
        "ttft_ms": {"p50": 30.0, "p95": None},
        "drafts": drafts,
        "draft_tokens": drafts * variant.length - (5 if drafts else 0),
        "accepted_tokens": drafts * sum(positions),
        "acceptance_per_position": positions,
        "step_ms": {"verify": 3.0, "draft": 2.0, "rest": 1.0} if mode == "offline" else None,
        "answers": ["a", "b"],
    } | more


def row(rows: list[dict], variant: Variant, concurrency: int = 1, mode: str = "offline") -> dict:
    (found,) = [r for r in rows if (r["mode"], r["label"], r["concurrency"]) == (mode, variant.label, concurrency)]
    return found


def test_the_grid_has_every_method_and_k_and_the_prompts_as_a_dataset(embedded_target, tmp_path):
    prompts = tmp_path / "asked.jsonl"
    prompts.write_text('{"id": "a", "turns": ["one", "two"]}\n{"id": "b", "turns": ["three"]}\n')
    made = make_grid(
        Settings(
            target=str(embedded_target),
            prompts=prompts,
            num_speculative_tokens=(2, 5),
            concurrency=(1, 8),
            num_prompts=4,
            output_len=9,
            bench_args="--top-p 0.9",
        ),
        tmp_path / "out",
    )
    assert [one.label for one in made.variants] == ["off", "ngram K=2", "ngram K=5", "gumiho K=2", "gumiho K=5"]
    assert made.variants[-1].speculative["num_speculative_tokens"] == 5
    assert "--speculative-config" not in made.engine_argv(OFF)
    argv = made.request_argv(8)
    assert argv[argv.index("--num-prompts") + 1] == "16"
    assert argv[argv.index("--max-concurrency") + 1] == "8"
    assert argv[argv.index("--top-p") + 1] == "0.9"
    dataset = Path(argv[argv.index("--dataset-path") + 1])
    assert [json.loads(line)["prompt"] for line in dataset.read_text().splitlines()] == ["one", "three"]


def test_auto_is_a_variant_of_our_drafters_alone(embedded_target, tmp_path):
    asked = Settings(target=str(embedded_target), num_speculative_tokens=(3, "auto"))
    made = make_grid(asked, tmp_path / "out")
    assert [one.label for one in made.variants] == ["off", "ngram K=3", "gumiho K=3", "gumiho K=auto"]
    assert made.variants[-1].speculative["num_speculative_tokens"] == "auto"


def test_drafts_by_request_are_of_our_drafters_alone(embedded_target, tmp_path):
    asked = Settings(target=str(embedded_target), num_speculative_tokens=(3,), per_request="confident")
    made = make_grid(asked, tmp_path / "out")
    assert [one.label for one in made.variants] == ["off", "ngram K=3", "gumiho K=3 confident"]
    assert made.variants[-1].speculative["num_speculative_tokens_per_request"] == "confident"
    assert ["--no-async-scheduling" in made.engine_argv(one) for one in made.variants] == [False, False, True]
    with pytest.raises(BenchError, match=r"--per-request confident ends drafts of gumiho and .* none is measured"):
        make_grid(dataclasses.replace(asked, methods=("ngram",)), tmp_path)


def test_other_weights_or_prompts_are_other_settings_and_more_repeats_are_not(embedded_target, tmp_path):
    prompts = tmp_path / "asked.jsonl"
    identities = []
    for text in ("one", "two"):
        prompts.write_text(json.dumps({"id": "a", "turns": [text]}))
        for repeats in (1, 2):
            made = make_grid(Settings(target=str(embedded_target), prompts=prompts, repeats=repeats), tmp_path / "out")
            identities.append(made.identity())
    assert identities[0] == identities[1] != identities[2] == identities[3]
    digests = identities[0]["inputs"].values()
    assert sum(isinstance(one, dict) and "model.safetensors" in one for one in digests) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("medusa",)}, "--method 'medusa': no such one; give one of none, ngram, eagle, gumiho"),
        ({"methods": ("eagle",)}, "--method eagle needs --eagle-checkpoint"),
        (
            {"methods": ("gumiho", "gumiho-layers"), "checkpoint": "layered"},
            "would both measure",
        ),
        ({"modes": ("server", "server")}, "--mode: a value is given twice"),
        ({"concurrency": (0,)}, r"--concurrency \[0\]: give whole numbers from 1"),
        ({"num_prompts": 0}, "--num-prompts 0"),
        ({"repeats": 0}, "--repeats 0"),
        ({"temperature": -1.0}, "--temperature -1"),
        ({"prompts": Path("no-such-file")}, "--prompts no-such-file: no such file"),
        ({"dataset_path": "x"}, "--dataset-path needs --dataset-name"),
        ({"prompts": Path(__file__), "dataset_name": "random"}, "two sources of prompts"),
        ({"bench_args": "--metadata 'open"}, "--bench-args .*: not a command line"),
        ({"engine_args": "--no-such-option"}, "--engine-args: vLLM does not take them: .*--no-such-option"),
    ],
)
def test_a_wrong_setting_is_refused_before_any_engine_starts(embedded_target, tmp_path, changes, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_released(tmp_path / "layered", tiny.layered_tensors())
    with pytest.raises(BenchError, match=message):
        make_grid(dataclasses.replace(Settings(target=str(embedded_target)), **changes), tmp_path)


def test_a_k_that_the_checkpoint_has_not_is_refused(embedded_target, tmp_path):
    with pytest.raises(CheckpointError, match="from 1 to 7"):
        make_grid(Settings(target=str(embedded_target), num_speculative_tokens=(8,)), tmp_path)


def test_finished_cells_are_kept_failed_and_cut_off_ones_are_not(tmp_path):
    store = Store(tmp_path, {"seed": 1})
    store.add(cell(OFF, 10))
    store.add(cell(OFF, 0, repeat=1, status="failed", reason="lost"))
    with (tmp_path / "cells.jsonl").open("a") as lines:
        lines.write('{"mode": "offline", "la')
    again = Store(tmp_path, {"seed": 1})
    assert again.finished("offline", "off", 1, 0)
    assert not again.finished("offline", "off", 1, 1)
    assert not again.finished("offline", "off", 1, 2)
    again.add(cell(OFF, 12, repeat=1))
    assert Store(tmp_path, {"seed": 1}).finished("offline", "off", 1, 1)


def test_cells_of_other_settings_are_refused_and_left_until_asked(tmp_path):
    Store(tmp_path, {"seed": 1, "target": "a"}).add(cell(OFF, 10))
    with pytest.raises(BenchError, match=r"other settings \(seed differ\).*--no-resume"):
        Store(tmp_path, {"seed": 2, "target": "a"})
    assert Store(tmp_path, {"seed": 1, "target": "a"}).cells
    assert not Store(tmp_path, {"seed": 2, "target": "a"}, resume=False).cells
    (tmp_path / "cells.jsonl").write_text("[1]\n")
    with pytest.raises(BenchError, match="not the cells of a benchmark"):
        Store(tmp_path, {"seed": 2, "target": "a"})


def test_speedup_is_over_the_same_cycle_and_its_median_and_range_are_kept():
    cells = [cell(OFF, 10), cell(OFF, 20, 1), cell(OFF, 40, 2)]
    cells += [cell(GUMIHO, 30), cell(GUMIHO, 20, 1), cell(GUMIHO, 80, 2, answers=["a", "x"])]
    found = row(summarise(grid(), cells), GUMIHO)
    assert (found["speedup"], found["speedup_range"]) == (2, [1, 3])
    assert (found["output_tokens_per_s"], found["output_tokens_per_s_range"]) == (30, [20, 80])
    assert found["equal"] == [5, 6]
    assert found["acceptance_length"] == pytest.approx(1.875)
    assert found["acceptance_per_position"] == pytest.approx([0.5, 0.25, 0.125])


def test_acceptance_is_weighted_by_drafts():
    cells = [cell(GUMIHO, 1, drafts=30, accepted_tokens=30, acceptance_per_position=[1.0, 0.0, 0.0])]
    cells += [cell(GUMIHO, 1, 1, drafts=10, accepted_tokens=0, acceptance_per_position=[0.0, 0.0, 0.0])]
    found = row(summarise(grid(), cells), GUMIHO)
    assert found["acceptance_per_position"] == pytest.approx([0.75, 0, 0])
    assert found["acceptance_length"] == pytest.approx(1.75)
    assert found["speedup"] is None


@given(st.lists(st.tuples(st.floats(0.1, 1e4), st.floats(0.1, 1e4)), min_size=1, max_size=5))
def test_a_speedup_lies_within_its_range_and_offs_own_is_one(speeds):
    cells = [one for r, (a, b) in enumerate(speeds) for one in (cell(OFF, a, r), cell(GUMIHO, b, r))]
    rows = summarise(grid(repeats=len(speeds)), cells)
    low, high = row(rows, GUMIHO)["speedup_range"]
    assert low <= row(rows, GUMIHO)["speedup"] <= high
    assert row(rows, OFF)["speedup"] == 1


@pytest.fixture
def report() -> dict:
    made = grid(modes=("offline", "server"))
    cells = [
        cell(v, 10 + i, r, c, m)
        for i, v in enumerate((OFF, GUMIHO))
        for r in range(3)
        for c in (1, 4)
        for m in ("offline", "server")
    ]
    cells += [cell(NGRAM, 0, r, 1, status="failed", reason="OutOfMemoryError: [large]\nmore") for r in range(3)]
    return {
        "date": "2026-01-01",
        "seconds": 1.0,
        "load_average": [1.0],
        "machine": {"cpu": "x"},
        "versions": {"vllm": "y"},
        "assumed": "",
        "summary": summarise(made, cells, "not run: no time left of 2 minutes"),
        "cells": cells,
    }


def test_rows_that_failed_or_were_not_run_stay_in_the_table_with_the_reason(report):
    assert len(report["summary"]) == 12
    console = Console(record=True, width=90, file=io.StringIO())
    show(console, report)
    text = " ".join(console.export_text().split())
    assert "ngram K=2 n=1: OutOfMemoryError: [large]" in text
    assert "ngram K=2 n=4: not run: no time left of 2 minutes" in text
    assert text.count("ngram K=2 - - - -") == 2 * 4
    assert "1.10x [1.10 1.10] 10.0/20.0 30.0/-" in text
    assert "2.5 1.88 .50 .25 .12 6/6 3.0 2.0 1.0 3/3" in text
    assert "n/a n/a n/a" in text


def test_cells_of_an_earlier_version_have_no_sent_tokens():
    cells = [cell(GUMIHO, 10, r) for r in range(3)]
    (found,) = [r for r in summarise(grid(concurrency=(1,)), cells, "") if r["label"] == GUMIHO.label and r["cells"]]
    assert found["sent_per_draft"] == 2.5
    del cells[1]["draft_tokens"]
    (found,) = [r for r in summarise(grid(concurrency=(1,)), cells, "") if r["label"] == GUMIHO.label and r["cells"]]
    assert found["sent_per_draft"] is None


def test_every_plot_is_drawn_and_assumed_acceptance_is_not_plotted(report, tmp_path):
    drawn = plot_all(report, tmp_path)
    assert [file.name for file in drawn] == ["speedup.png", "acceptance.png", "step.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size < 100_000 for file in drawn)
    assumed = plot_all(report | {"assumed": "Acceptance is assumed."}, tmp_path / "assumed")
    assert [file.name for file in assumed] == ["speedup.png", "step.png"]


def test_a_cell_in_which_a_request_failed_is_no_result():
    with pytest.raises(BenchError, match="2 of 8 requests failed: Bad Gateway"):
        served.read_result({"failed": 2, "completed": 6, "errors": ["", "Traceback\nBad Gateway"]}, 3)


def test_the_commands_name_what_a_user_would_type():
    start, one, four = served.commands(grid(), GUMIHO)
    assert start.startswith("vllm serve target ")
    assert one.startswith("vllm bench serve --model target ")
    assert "--max-concurrency 1" in one
    assert "--max-concurrency 4" in four


def test_assumed_acceptance_is_what_was_published():
    assert 1 + sum(GUMIHO_RATES[:6]) == pytest.approx(2.26)
    assert 1 + sum(EAGLE_RATES[:3]) == pytest.approx(2.29, abs=0.002)
    assert 1 + sum(EAGLE_RATES[:6]) == pytest.approx(2.45, abs=0.002)
    for rates in (GUMIHO_RATES, EAGLE_RATES):
        assert list(rates) == sorted(rates, reverse=True)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_a_whole_gumiho_checkpoint_that_takes_no_room(tmp_path, name):
    shape = SHAPES[name]
    if shape.vocab_size > 1000:
        # A tokenizer of that size takes seconds; it is the same code.
        shape = dataclasses.replace(shape, vocab_size=160)
    folders = write_models(shape, tmp_path)
    checkpoint = open_checkpoint(folders["gumiho"])
    assert (checkpoint.sizes.num_heads, checkpoint.sizes.max_draft_tokens) == (5, 7)
    assert checkpoint.sizes.hidden_size == shape.hidden_size
    assert checkpoint.infos.keys() == tensor_shapes(drafter_sizes(shape)).keys()
    file = folders["gumiho"] / "model.safetensors"
    assert file.stat().st_blocks * 512 < 100_000
    labels = [one.label for one in variants(folders, [1, 7])]
    assert labels == ["off", "eagle K=1", "eagle K=7", "gumiho K=1", "gumiho K=7"]
