"""Sampled answers: which conversations are sampled, and that a run in parts draws what the whole run draws."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from vllm_gumiho.training.generate import SAMPLED_TEMPERATURE, Questions

MAX_PROMPT, MAX_TOKENS = 64, 6
NAMES = [f"p{i}" for i in range(6)]

# One engine for all runs, as a start costs more than the answers.  A step has no room for two prompts.
SCRIPT = f"""
import functools, sys
from pathlib import Path

import vllm

from vllm_gumiho.training.generate import Questions, generate_answers

if __name__ == "__main__":
    vllm.LLM = functools.cache(vllm.LLM)
    folder = Path(sys.argv[2])
    questions = Questions({MAX_TOKENS}, {MAX_PROMPT}, max_turns=2, sampled=0.5)
    longest = {MAX_PROMPT + 2 * MAX_TOKENS}
    engine = dict(enforce_eager=True, max_num_seqs=4, max_num_batched_tokens=longest, dtype="float32")

    def run(name, shard=(0, 1), limit=0):
        generate_answers(sys.argv[1], [folder / "p.jsonl"], folder / name, questions, None, shard, limit, **engine)

    run("whole")
    lines = (folder / "whole").read_text().splitlines(keepends=True)
    (folder / "killed").write_text("".join(lines[:3]) + lines[3][:20])
    run("killed")
    run("limited", limit=2)
    run("limited")
    run("shards", shard=(1, 2))
    run("shards", shard=(0, 2))
"""


def test_the_share_that_is_sampled_is_chosen_by_id_and_seed():
    names = [f"n{i}" for i in range(400)]

    def chosen(**changes):
        questions = Questions(**changes)
        temperatures = {name: questions.temperature(name) for name in names}
        assert set(temperatures.values()) <= {0.0, SAMPLED_TEMPERATURE}
        return {name for name, temperature in temperatures.items() if temperature}

    assert not chosen(sampled=0.0)
    assert chosen(sampled=1.0) == set(names)
    # Chance moves a share of 0.3 by .023.
    assert len(chosen(sampled=0.3)) / len(names) == pytest.approx(0.3, abs=0.08)
    assert chosen(sampled=0.3) == chosen(sampled=0.3) != chosen(sampled=0.3, seed=1)
    assert chosen(sampled=0.3) < chosen(sampled=0.6), "a greater share takes more, not others"


def test_every_answer_has_a_seed_of_its_own():
    seeds = {
        Questions(seed=seed).answer_seed(name, turn) for seed in (0, 1) for name in ("a", "b", "a:0") for turn in (0, 1)
    }
    assert len(seeds) == 12
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.engine
def test_a_run_in_parts_draws_what_the_whole_run_draws(tmp_path, embedded_target):
    lines = [json.dumps({"id": name, "turns": [f"Number {name}: " + "go on " * 4, "More."]}) for name in NAMES]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    (tmp_path / "main.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py"), str(embedded_target), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]

    def answers(name):
        records = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert len(records) == len(NAMES)
        return {record["id"]: record for record in records}

    whole = answers("whole")
    assert {name: record["temperature"] for name, record in whole.items()} == {
        name: Questions(sampled=0.5).temperature(name) for name in NAMES
    }
    assert {record["temperature"] for record in list(whole.values())[3:]} == {0.0, SAMPLED_TEMPERATURE}
    assert any(len(record["turns"]) == 2 for record in whole.values())
    assert all(2 * len(record["turns"][0]["prompt"]) > MAX_PROMPT + 2 * MAX_TOKENS for record in whole.values())
    for name in ("killed", "limited", "shards"):
        assert answers(name) == whole, name
