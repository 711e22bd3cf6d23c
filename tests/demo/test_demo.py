"""`vllm-gumiho demo`: rounds of both engines, the picture, and the closing words."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_gumiho.cli import app
from vllm_gumiho.demo import chat
from vllm_gumiho.demo.picture import answers, in_words, speeds
from vllm_gumiho.drafters import PER_REQUEST
from vllm_gumiho.drafters.checkpoints import open_checkpoint
from vllm_gumiho.drafters.conversion import convert_checkpoint
from vllm_gumiho.engines.prompts import QUESTIONS
from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.request.catalogue import checkpoint_for, local_path
from vllm_gumiho.request.lengths import SCHEDULE, TOKENS, schedule_problem


class Engine:
    """Answers a token of each question a turn, ``seconds`` each, and ends after four."""

    def __init__(self, seconds: float, accepted: int = 0, wrong: int | None = None):
        self.seconds, self.accepted, self.wrong = seconds, accepted, wrong
        self.asked: list[list[int]] = []
        self.started = {"vllm": "0.32.0", "model_runner": "V1", "draft_length": 7}

    def ask(self, do: str, **given):
        if do == "begin":
            self.asked.append(given["numbers"])
            self.written = 0
            return None
        if do == "counts":
            sent = 2 * self.accepted
            return {"drafts": self.accepted, "draft_tokens": sent, "accepted_tokens": self.accepted}
        self.written += 1
        numbers = self.asked[-1]
        return {
            "texts": {str(n): f"answer {n} " * self.written for n in numbers},
            "tokens": {str(n): [n + (n == self.wrong)] * self.written for n in numbers},
            "seconds": self.written * self.seconds,
            "passes": len(numbers) * self.written // 2,
            "left": 0 if self.written == 4 else len(numbers),
        }


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch):
    monkeypatch.setattr(chat, "REST_S", 0.0)


def rounds(off: Engine, on: Engine, terminal: bool = False) -> tuple[dict, str]:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    engines = {chat.OFF: off, chat.ON: on}
    return {n: chat._round(engines, n, 8, console) for n in (1, 4)}, console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_engines_take_turns_over_all_questions(terminal):
    off, on = Engine(0.2), Engine(0.1)
    found, shown = rounds(off, on, terminal)
    assert off.asked == on.asked == [[n] for n in range(10)] + [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for runs in found.values():
        assert set(runs[chat.OFF].tokens) == set(range(len(QUESTIONS)))
        assert runs[chat.OFF].written == 40
    assert found[1][chat.OFF].speed == pytest.approx(5)
    assert found[1][chat.ON].speed == pytest.approx(10)
    assert found[4][chat.OFF].speed == pytest.approx(40 / 2.4)
    assert ("question 5 to 8 of 10, Gumiho: 16 tokens in 0.4 s" in shown) is not terminal
    if terminal:
        assert "Gumiho: 10.0 tokens/s" in shown
        assert QUESTIONS[-1] in shown


def test_the_report_and_what_is_said_of_it():
    found, _ = rounds(Engine(0.2), Engine(0.125, accepted=20))
    report = chat._report(found, Engine(0).started, equal=True)
    first = report["rounds"]["1"]
    assert first["speedup"] == pytest.approx(1.6)
    assert (first["sent"], first["accepted"], first["tokens_per_pass"]) == (40, 20, 2.0)
    said = in_words(report)
    assert said.startswith("With Gumiho: the same texts, 1.60x as fast with 1 at a time and 1.60x as fast with 4")
    assert "50% were right" in said
    console = Console(file=io.StringIO(), width=120)
    console.print(speeds(report), answers(found[1][chat.OFF], found[1][chat.ON]))
    shown = console.file.getvalue()
    assert "1.60x" in shown
    assert "40, 20" in shown


def test_the_share_that_was_right_is_of_all_that_was_checked():
    figures = {"1": {"speedup": 1.5, "accepted": 10, "sent": 100}, "4": {"speedup": 1.2, "accepted": 30, "sent": 60}}
    assert " Of the draft tokens that were checked 25% were right." in in_words(
        {"rounds": figures, "outputs_equal": True}
    )


@pytest.mark.parametrize(
    ("speedups", "words"),
    [((1.5, 1.1), "less idle compute"), ((1.0, 0.9), "so small that checking drafts costs"), ((1.2, 1.4), "")],
)
def test_why_it_is_not_faster(speedups, words):
    figures = {str(n): {"speedup": s, "accepted": 0, "sent": 0} for n, s in zip((1, 4), speedups, strict=True)}
    said = in_words({"rounds": figures, "outputs_equal": True})
    assert words in said
    assert said.endswith("with 4 at a time.") is not bool(words)


def test_how_long_drafts_are(monkeypatch, tmp_path):
    opened = open_checkpoint(local_path(checkpoint_for("gumiho", "models/SmolLM2-135M-Instruct")))
    monkeypatch.setattr(chat, "on_cpu", lambda: True)
    assert chat._lengths(None, opened) == {TOKENS: 4, SCHEDULE: chat.CPU_SCHEDULE}
    assert schedule_problem(chat.CPU_SCHEDULE, 4) is None
    assert chat._lengths(3, opened) == {TOKENS: 3, PER_REQUEST: "confident"}
    assert chat._lengths("auto", opened) == {TOKENS: "auto"}
    with pytest.raises(CheckpointError, match=r"num_speculative_tokens=8 with .*: it drafts"):
        chat._lengths(8, opened)
    convert_checkpoint(opened.path, tmp_path / "own")
    assert chat._lengths(None, open_checkpoint(tmp_path / "own")) == {TOKENS: 7, PER_REQUEST: "confident"}
    monkeypatch.setattr(chat, "on_cpu", lambda: False)
    assert chat._lengths(None, opened) == {TOKENS: 7}
    assert chat._lengths(3, opened) == {TOKENS: 3}


def test_other_texts_are_said_loudly():
    found, _ = rounds(Engine(0.2), Engine(0.1, wrong=3))
    assert "OTHER TEXTS" in in_words(chat._report(found, Engine(0).started, equal=False))


@pytest.mark.long
@pytest.mark.engine
def test_a_real_demonstration(tmp_path):
    output = tmp_path / "demo.json"
    done = CliRunner().invoke(app, ["demo", "--max-tokens", "6", "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert "With Gumiho: the same texts" in done.output
    report = json.loads(output.read_text())
    assert report["outputs_equal"]
    assert set(report["rounds"]) == {"1", "4"}
    assert all(0 < one["accepted"] < one["sent"] for one in report["rounds"].values())
    assert output.with_suffix(".log").stat().st_size > 0
