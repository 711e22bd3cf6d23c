"""The judge on real engines: the embedded target with its bundled head, n-grams and an EAGLE drafter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from vllm_gumiho.drafters.checkpoints import open_checkpoint
from vllm_gumiho.request.catalogue import BUNDLED

pytestmark = pytest.mark.engine
BIN = Path(sys.executable).parent
MAX_TOKENS, K = 12, 3
TURNS = {
    "chat": {"talk": ["Name three fruits.", "Name three more."], "hello": ["Say hello."]},
    "facts": {"capital": ["What is the capital of France?"], "count": ["Count from one to ten."]},
}
ANSWERS = {name: sum(map(len, prompts.values())) for name, prompts in TURNS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    (folder / "prompts").mkdir()
    for name, prompts in TURNS.items():
        lines = [json.dumps({"id": i, "source": "test", "task": name, "turns": turns}) for i, turns in prompts.items()]
        (folder / "prompts" / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def judged(folder, embedded_target):
    """Runs ``vllm-gumiho eval`` and returns the finished process and its report."""

    def judge(name: str, *options: str) -> tuple[subprocess.CompletedProcess, dict]:
        command = [
            str(BIN / "vllm-gumiho"),
            "eval",
            "--target",
            str(embedded_target),
            "--prompts",
            str(folder / "prompts"),
            "--max-tokens",
            str(MAX_TOKENS),
            "--turns",
            "all",
            "--output",
            str(folder / f"{name}.json"),
            *options,
        ]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=800, check=False)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return done, json.loads((folder / f"{name}.json").read_text())

    return judge


@pytest.fixture(scope="module")
def off(judged) -> dict:
    done, report = judged("off", "--method", "none")
    assert done.returncode == 0, done.stdout + done.stderr
    return report


def test_a_run_without_speculation_answers_every_turn(off):
    (run,) = off["runs"]
    assert off["complete"]
    assert run["engine"]["dtype"] == "float32"
    for name, prompts in TURNS.items():
        answers = run["outputs"][name]
        assert {i: len(one["tokens"]) for i, one in answers.items()} == {i: len(turns) for i, turns in prompts.items()}
        tokens = [len(turn.split()) for one in answers.values() for turn in one["tokens"]]
        assert all(0 < count <= MAX_TOKENS for count in tokens)
        assert run["sets"][name]["output_tokens"] == sum(tokens)
        assert run["sets"][name]["drafts"] == 0
    assert run["outputs"]["chat"]["talk"]["tokens"][0] != run["outputs"]["chat"]["talk"]["tokens"][1]


def check_counts(run: dict, k: int) -> None:
    for name, one in run["sets"].items():
        accepted = one["accepted_per_position"]
        assert one["drafts"] > 0
        assert len(accepted) == k
        assert accepted == sorted(accepted, reverse=True)
        assert one["accepted_tokens"] == sum(accepted)
        assert one["acceptance_length"] == pytest.approx(1 + sum(accepted) / one["drafts"])
        assert one["acceptance_per_position"] == pytest.approx([count / one["drafts"] for count in accepted])
        # A prompt's pass makes one token, a step with a draft one and the accepted; an answer's end may cut some off.
        made = ANSWERS[name] + one["drafts"] + one["accepted_tokens"]
        assert made - k * ANSWERS[name] <= one["output_tokens"] <= ANSWERS[name] * MAX_TOKENS
    lengths = [one["acceptance_length"] for one in run["sets"].values()]
    assert run["mean"]["acceptance_length"] == pytest.approx(sum(lengths) / len(lengths))


def test_gumiho_is_judged_against_a_baseline_at_two_temperatures(judged, folder, off):
    done, report = judged(
        "gumiho",
        "--num-speculative-tokens",
        str(K),
        "--temperature",
        "0",
        "--temperature",
        "1",
        "--baseline",
        str(folder / "off.json"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for run in report["runs"]:
        mean = run["mean"]
        sent = f"{mean['draft_tokens']} tokens sent to verification, {mean['accepted_tokens']} accepted"
        assert f"{mean['drafts']} drafts, {sent}" in done.stdout
    assert (report["complete"], report["different"]) == (True, 0)
    greedy, sampled = report["runs"]
    assert (greedy["temperature"], sampled["temperature"]) == (0, 1)
    assert greedy["engine"]["draft_architecture"] == "EagleGumihoForCausalLM"
    for run in report["runs"]:
        check_counts(run, K)
        for one in run["sets"].values():
            assert one["draft_tokens"] == K * one["drafts"]
    for name, one in greedy["sets"].items():
        assert (one["equal"], one["different"]) == (2, [])
        assert one["output_tokens"] == off["runs"][0]["sets"][name]["output_tokens"]
    assert greedy["mean"]["accepted_tokens"] > 0
    assert sampled["mean"]["equal"] is None
    digest = report["checkpoint"]["weights_sha256"]["model.safetensors"]
    assert len(digest) == 64
    assert digest != report["target"]["weights_sha256"]["model.safetensors"]


def test_ngram_is_judged_and_a_planted_difference_is_named(judged, folder, off):
    planted = json.loads((folder / "off.json").read_text())
    answer = planted["runs"][0]["outputs"]["facts"]["count"]
    tokens = answer["tokens"][0].split()
    true, tokens[4] = int(tokens[4]), "17"
    answer["tokens"] = [" ".join(tokens)]
    (folder / "planted.json").write_text(json.dumps(planted))
    done, report = judged(
        "ngram", "--method", "ngram", "--num-speculative-tokens", str(K), "--baseline", str(folder / "planted.json")
    )
    assert done.returncode == 1
    assert f"facts: count differs from speculation off in turn 0 at token 4: 17 without, {true} with" in done.stdout
    (run,) = report["runs"]
    assert report["different"] == 1
    assert run["sets"]["facts"]["different"] == [{"id": "count", "turn": 0, "position": 4, "off": 17, "on": true}]
    assert (run["sets"]["chat"]["equal"], run["sets"]["facts"]["equal"]) == (2, 1)
    assert run["mean"]["draft_tokens"] >= run["mean"]["drafts"]


@pytest.mark.long
def test_an_eagle_folder_is_judged_and_runs_its_own_baseline(judged, folder, embedded_target, off):
    """The bundled head's first layer, in vLLM's own EAGLE format; a poor drafter, but a lossless one."""
    eagle = folder / "eagle"
    eagle.mkdir()
    config = json.loads((embedded_target / "config.json").read_text())
    tensors = open_checkpoint(BUNDLED / "smollm2-135m-instruct").tensors()
    kept = {n: t.float() for n, t in tensors if n == "fc.weight" or n.startswith("layers.0.")}
    save_file(kept, eagle / "model.safetensors")
    size = kept["layers.0.mlp.gate_proj.weight"].shape[0]
    (eagle / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "intermediate_size": size}))
    done, report = judged(
        "eagle", "--method", "eagle", "--checkpoint", str(eagle), "--num-speculative-tokens", "2", "--limit", "1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    none, run = report["runs"]
    assert none["outputs"]["chat"] == {"talk": off["runs"][0]["outputs"]["chat"]["talk"]}
    assert run["engine"]["draft_architecture"] == "EagleLlamaForCausalLM"
    assert run["mean"]["equal"] == run["mean"]["prompts"] == 2
    assert all(one["drafts"] > 0 for one in run["sets"].values())
