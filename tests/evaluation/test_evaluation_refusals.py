"""What bad input to `vllm-gumiho eval` gets before any engine starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import typer
from rich.console import Console

from vllm_gumiho.errors import GumihoError
from vllm_gumiho.evaluation import judge as judging
from vllm_gumiho.evaluation.settings import Settings
from vllm_gumiho.request.per_request import PER_REQUEST, per_request_option

BIN = Path(sys.executable).parent
K = 4
LINE = '{"id": "a", "turns": ["Hello"]}\n'


@pytest.fixture
def prompts(tmp_path) -> Path:
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "one.jsonl").write_text(LINE)
    return folder


@pytest.fixture
def refused(monkeypatch, tmp_path, prompts, embedded_target):
    """Message of the error that settings get; an engine that starts fails the test."""

    def started(*args, **kwargs):
        pytest.fail("an engine was started")

    monkeypatch.setattr(subprocess, "Popen", started)

    def judge(**changes) -> str:
        settings = {"target": str(embedded_target), "prompts": prompts, "output": tmp_path / "r.json", **changes}
        with pytest.raises(GumihoError) as caught:
            judging.judge(Settings(**settings), Console(quiet=True))
        return str(caught.value)

    return judge


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "one.jsonl: an empty set; put prompts in it"),
        ("{", "one.jsonl:1: not a prompt (Expecting property name"),
        ("[1]", "one.jsonl:1: not a prompt (it is list, not an object)"),
        (LINE + '{"turns": ["x"]}', "one.jsonl:2: not a prompt (it has no id"),
        (LINE + '{"id": "b", "turns": []}', "one.jsonl:2: not a prompt (its turns"),
        (LINE + '{"id": "b", "turns": ["x", 3]}', "one.jsonl:2: not a prompt (its turns"),
        (LINE + LINE, "one.jsonl:2: id 'a' is there twice"),
        (b"\xff", "one.jsonl: not readable as UTF-8"),
    ],
)
def test_a_wrong_set_is_named_by_file_and_line(refused, prompts, content, message):
    (prompts / "one.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "medusa"}, "'medusa': no such method; give one of gumiho, gumiho-layers, moa, eagle, ngram, none"),
        ({"num_speculative_tokens": (8,)}, "num_speculative_tokens=8 .* give a whole number from 1 to 7"),
        ({"num_speculative_tokens": (3, 0)}, "--num-speculative-tokens 0: give whole numbers from 1"),
        ({"num_speculative_tokens": (3, 3)}, "a value is given twice"),
        ({"num_speculative_tokens": ("auto",), "method": "ngram"}, "auto does not go with method 'ngram'"),
        ({"num_speculative_tokens": (3, "auto"), "rank_hits": True}, "auto does not go with --rank-hits"),
        ({"num_speculative_tokens": (3,), "method": "none"}, "goes with a method that drafts"),
        ({"temperatures": (-1.0,)}, "--temperature -1.0: give 0"),
        ({"temperatures": (float("nan"),)}, "--temperature nan: give 0"),
        ({"checkpoint": "x", "method": "ngram"}, "--checkpoint x: method 'ngram' has none"),
        (
            {"per_request": "confident", "method": "ngram"},
            "--per-request confident ends drafts of gumiho and .*leave it out",
        ),
        ({"method": "eagle"}, "--method eagle needs --checkpoint FOLDER"),
        ({"checkpoint": "./absent"}, "absent: no such file or folder"),
        ({"baseline": Path("absent.json")}, "--baseline absent.json: not readable .* --method none"),
        ({"baseline": Path("x.json"), "method": "none"}, "--method none makes baselines"),
        ({"max_tokens": 0}, "--max-tokens 0: give a whole number from 1"),
        ({"max_model_len": 20}, "set one: no prompt fits into 20 tokens"),
        ({"target": "./absent"}, "--target ./absent: no such folder"),
        ({"prompts": Path("absent")}, "absent: no such folder of prompts"),
        ({"output": Path("/dev/null/r.json")}, "/dev/null/r.json: cannot be written"),
    ],
)
def test_bad_input_is_refused_before_an_engine_starts(refused, changes, message):
    assert re.search(message, refused(**changes))


def test_folders_that_are_no_input_are_named(refused, tmp_path, tiny_target, tiny_checkpoint):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}: no *.jsonl in it" in refused(prompts=empty)
    assert f"--target {empty}: no config.json" in refused(target=str(empty))
    assert f"{empty}: no *.safetensors" in refused(checkpoint=str(empty))
    assert f"{empty}: no *.safetensors" in refused(method="eagle", checkpoint=str(empty))
    assert f"{empty}: cannot be written (it is a folder)" in refused(output=empty)
    assert f"no Gumiho checkpoint is known for target {str(tiny_target)!r}" in refused(target=str(tiny_target))
    message = refused(target=str(tiny_target), checkpoint=str(tiny_checkpoint))
    assert f"--target {tiny_target}: no config or tokenizer could be read" in message


def test_the_command_ends_with_one_line_and_exit_code_2(tmp_path):
    command = [BIN / "vllm-gumiho", "eval", "--prompts", tmp_path / "absent", "--output", tmp_path / "r.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120, check=False)
    assert done.returncode == 2
    assert (
        done.stderr.strip() == f"vllm-gumiho: {tmp_path}/absent: no such folder of prompts; give one with *.jsonl files"
    )


def test_gumiho_checkpoints_of_another_size_bound_k(refused, tmp_path):
    short = tiny.write_released(tmp_path / "short", tiny.drafter_tensors(num_heads=1))
    assert "give a whole number from 1 to 3" in refused(checkpoint=str(short), num_speculative_tokens=(4,))


def test_drafts_by_request_reach_the_engine_that_drafts(monkeypatch, tmp_path, prompts, embedded_target):
    jobs = []

    class StartedError(Exception):
        """In place of an engine."""

    def worker(tasks, job, *args, **kwargs):
        jobs.append(job["llm"])
        raise StartedError

    monkeypatch.setattr(judging, "Worker", worker)
    settings = {"target": str(embedded_target), "prompts": prompts, "output": tmp_path / "r.json"}
    for changes in ({"per_request": "confident"}, {"per_request": "0.1"}, {}):
        with pytest.raises(StartedError):
            judging.judge(Settings(**settings, temperatures=(1.0,), **changes), Console(quiet=True))
    by_default, by_cost, off = jobs
    assert by_default["speculative_config"][PER_REQUEST] == "confident"
    assert by_cost["speculative_config"][PER_REQUEST] == 0.1
    assert by_default["async_scheduling"] is by_cost["async_scheduling"] is False
    assert PER_REQUEST not in off["speculative_config"]
    assert "async_scheduling" not in off


@pytest.mark.parametrize("text", ["nan", "0", "-1", "sure"])
def test_another_way_to_end_drafts_is_refused(text):
    with pytest.raises(typer.BadParameter, match=f"'{text}' ends no draft; give \"confident\""):
        per_request_option(text)
