"""The judge's arithmetic and what it reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gumiho.engines.counters import Counts, acceptance, read_counts
from vllm_gumiho.engines.prompts import Prompt
from vllm_gumiho.errors import EvalError, FigureError
from vllm_gumiho.evaluation import plot
from vllm_gumiho.evaluation.baseline import Identity, load, pack
from vllm_gumiho.evaluation.metrics import differences, mean_over_sets
from vllm_gumiho.evaluation.report import run_title
from vllm_gumiho.evaluation.sets import fit, read_sets

BIN = Path(sys.executable).parent
K = 4
LINE = '{"id": "a", "turns": ["Hello"]}\n'


def counted(accepted: list[int]) -> Counts:
    """Counters after drafts of K tokens, of which these many were accepted."""
    per_position = tuple(sum(n > i for n in accepted) for i in range(K))
    return Counts(len(accepted), K * len(accepted), sum(accepted), per_position)


@given(st.lists(st.integers(0, K), min_size=1, max_size=40), st.lists(st.integers(0, K), max_size=40))
def test_figures_of_a_set_are_those_of_its_own_drafts(accepted, earlier):
    figures = acceptance(counted(earlier + accepted) - counted(earlier), K)
    n = len(accepted)
    assert figures["acceptance_length"] == pytest.approx(1 + sum(accepted) / n)
    assert figures["accepted_per_step"] == pytest.approx(sum(accepted) / n)
    assert sum(figures["acceptance_per_position"]) == pytest.approx(sum(accepted) / n)
    product = 1.0
    for i in range(K):
        reached = [a for a in accepted if a >= i]
        conditional = figures["conditional_accuracy_per_position"][i]
        if not reached:
            assert conditional is None
            continue
        assert conditional == pytest.approx(sum(a > i for a in reached) / len(reached))
        product *= conditional
        assert figures["acceptance_per_position"][i] == pytest.approx(product)


def test_without_drafts_every_step_makes_one_token():
    assert acceptance(Counts(), 2) == {
        "acceptance_length": 1.0,
        "accepted_per_step": 0.0,
        "acceptance_per_position": [0.0, 0.0],
        "conditional_accuracy_per_position": [None, None],
    }
    assert counted([1, 2]) - Counts() == counted([1, 2])


def test_of_auto_the_positions_are_those_that_the_engine_counts():
    assert (
        acceptance(counted([3, 1]), "auto")["acceptance_per_position"]
        == acceptance(counted([3, 1]), K)["acceptance_per_position"]
    )
    assert acceptance(Counts(), "auto")["acceptance_per_position"] == []
    run = {"method": "gumiho", "num_speculative_tokens": 2, "temperature": 0.0}
    asked = {"speculative_config": {"num_speculative_tokens": "auto"}}
    assert (run_title(run), run_title(run | asked)) == ("gumiho K=2 T=0", "gumiho K=auto T=0")


def test_counters_are_those_of_vllms_names_summed_over_engines():
    prefix = "vllm:spec_decode_num_"
    metrics = [
        SimpleNamespace(name=f"{prefix}drafts", value=3),
        SimpleNamespace(name=f"{prefix}drafts", value=2),
        SimpleNamespace(name=f"{prefix}draft_tokens", value=10),
        SimpleNamespace(name=f"{prefix}accepted_tokens", value=4),
        SimpleNamespace(name=f"{prefix}accepted_tokens_per_pos", values=[2, 1]),
        SimpleNamespace(name=f"{prefix}accepted_tokens_per_pos", values=[1, 0]),
        SimpleNamespace(name="vllm:drafts", value=100),
        SimpleNamespace(name="drafts", value=100),
    ]
    assert read_counts(metrics) == Counts(5, 10, 4, (3, 1))


def test_the_mean_weighs_sets_alike_and_totals_count_tokens():
    rest = {"prompts": 2, "output_tokens": 10, "seconds": 2.0, "drafts": 1, "draft_tokens": 2, "accepted_tokens": 1}
    one = {
        "acceptance_length": 2.0,
        "accepted_per_step": 1.0,
        "acceptance_per_position": [1.0, 0.0],
        "conditional_accuracy_per_position": [1.0, 0.0],
        "equal": 2,
        **rest,
    }
    other = {
        "acceptance_length": 1.0,
        "accepted_per_step": 0.0,
        "acceptance_per_position": [0.0, 0.0],
        "conditional_accuracy_per_position": [0.0, None],
        "equal": 1,
        **rest,
        "output_tokens": 50,
        "prompts": 8,
    }
    mean = mean_over_sets([one, other])
    assert mean["acceptance_length"] == 1.5
    assert mean["acceptance_per_position"] == [0.5, 0.0]
    assert mean["conditional_accuracy_per_position"] == [0.5, 0.0]
    assert (mean["prompts"], mean["output_tokens"], mean["output_tokens_per_s"], mean["equal"]) == (10, 60, 15.0, 3)


def test_differences_name_prompt_turn_and_token():
    off = {"same": [[1, 2]], "longer": [[1, 2]], "second turn": [[1], [4, 5]], "shorter": [[7, 8]]}
    on = {"same": [[1, 2]], "longer": [[1, 2, 3]], "second turn": [[1], [4, 6]], "shorter": [[7]]}
    assert differences(off, on, off) == [
        {"id": "longer", "turn": 0, "position": 2, "off": None, "on": 3},
        {"id": "second turn", "turn": 1, "position": 1, "off": 5, "on": 6},
        {"id": "shorter", "turn": 0, "position": 1, "off": 8, "on": None},
    ]


def test_sets_are_files_in_order_with_first_or_all_turns(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"id": "x", "turns": ["1", "2"]}\n\n' + LINE)
    (tmp_path / "a.jsonl").write_text('{"id": "x", "source": "s", "task": "t", "turns": ["\\u2028 3"]}')
    assert read_sets(tmp_path) == {
        "a": [Prompt("x", ("\u2028 3",))],
        "b": [Prompt("x", ("1",)), Prompt("a", ("Hello",))],
    }
    assert read_sets(tmp_path, limit=1, all_turns=True)["b"] == [Prompt("x", ("1", "2"))]


class Words:
    """Stands for a tokenizer: one token a word, two for each message, one for the answer's beginning."""

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        assert add_generation_prompt
        assert not return_dict
        return [0] * (1 + sum(2 + len(message["content"].split()) for message in messages))


def test_prompts_that_do_not_fit_are_named_and_the_context_is_as_long_as_the_rest_needs():
    sets = {"s": [Prompt("short", ("a b",)), Prompt("long", ("a " * 90,)), Prompt("talk", ("a b", "c d"))]}
    fitting = fit(sets, Words(), max_tokens=10, most=60)
    assert [prompt.id for prompt in fitting.sets["s"]] == ["short", "talk"]
    assert fitting.refused == {"s": ["long"]}
    # Two user turns of 4 tokens, an empty answer of 2, the beginning of the next; two answers of 10.
    assert fitting.max_model_len == 4 + 2 + 4 + 1 + 20 + 16
    assert fit(sets, Words(), 10, 60, max_model_len=20).refused == {"s": ["long", "talk"]}
    with pytest.raises(EvalError, match=r"set s: no prompt fits into 14 tokens .*the shortest needs 15.*raise"):
        fit(sets, Words(), 10, 60, max_model_len=14)
    with pytest.raises(EvalError, match="--max-model-len 61: the target has 60"):
        fit(sets, Words(), 10, 60, max_model_len=61)


IDENTITY = Identity({"model.safetensors": "00"}, "float32", 8, False)
PROMPT = Prompt("a", ("Hello",))


@pytest.fixture
def baseline(tmp_path):
    """Writes a report with a greedy run without speculation, changed by a function, and returns its path."""

    def write(change=lambda report: None) -> Path:
        run = {"method": "none", "temperature": 0.0, "outputs": {"s": pack([PROMPT], {"a": [[5, 6]]})}}
        report = {"identity": vars(IDENTITY).copy(), "runs": [{"method": "gumiho", "temperature": 0.0}, run]}
        change(report)
        (tmp_path / "b.json").write_text(json.dumps(report))
        return tmp_path / "b.json"

    return write


def test_a_baseline_gives_back_the_answers(baseline):
    assert load(baseline(), IDENTITY, {"s": [PROMPT]}) == {"s": {"a": [[5, 6]]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["identity"].update(dtype="bfloat16"), "run with dtype 'bfloat16', this run has 'float32'"),
        (lambda r: r["identity"].update(target="other"), "run with target 'other'"),
        (lambda r: r["identity"].pop("dtype"), "no report of a greedy run without speculation"),
        (lambda r: r["runs"].pop(), "no report of a greedy run without speculation"),
        (lambda r: r["runs"][1].update(temperature=1.0), "no report of a greedy run without speculation"),
        (lambda r: r["runs"][1]["outputs"]["s"]["a"].update(tokens=["5 x"]), "no report of a greedy run"),
        (lambda r: r["runs"][1]["outputs"]["s"]["a"].update(tokens=[]), "answers to a are not one a turn"),
        (lambda r: r["runs"][1]["outputs"]["s"].pop("a"), "no answers to these prompts of set s: a; make"),
        (lambda r: r["runs"][1]["outputs"]["s"]["a"].update(prompt_sha256="0"), "no answers to these prompts of set s"),
    ],
)
def test_a_baseline_of_something_else_is_refused(baseline, change, message):
    with pytest.raises(EvalError, match=message):
        load(baseline(change), IDENTITY, {"s": [PROMPT]})


def report_file(file: Path, *runs: tuple[str, int, float, list[float]]) -> Path:
    content = [
        {
            "method": method,
            "num_speculative_tokens": k,
            "temperature": t,
            "mean": {
                "acceptance_length": 1 + sum(rates),
                "acceptance_per_position": rates,
                "conditional_accuracy_per_position": [*rates[:-1], None],
            },
        }
        for method, k, t, rates in runs
    ]
    file.write_text(json.dumps({"runs": content}))
    return file


def test_a_plot_has_a_curve_a_run_and_its_filters_work(tmp_path):
    from matplotlib.image import imread

    a = report_file(tmp_path / "a.json", ("none", 0, 0.0, [0.0]), ("gumiho", 3, 0.0, [0.7, 0.5, 0.2]))
    b = report_file(tmp_path / "b.json", ("eagle", 2, 0.0, [0.6, 0.3]), ("eagle", 2, 1.0, [0.5, 0.2]))
    runs = plot.read_runs([a, b], ["ours", "EAGLE-1"], [], [])
    assert [label for label, _ in runs] == ["ours", "EAGLE-1, eagle K=2 T=0", "EAGLE-1, eagle K=2 T=1"]
    assert [label for label, _ in plot.read_runs([a, b], [], [], [0.0])] == ["a", "b"]
    plot.plot_acceptance(runs, tmp_path / "new" / "all.png")
    plot.plot_acceptance(runs[:1], tmp_path / "one.png")
    all_runs, one_run = imread(tmp_path / "new" / "all.png"), imread(tmp_path / "one.png")
    assert all_runs.shape[:2] == (540, 1320)
    coloured = [int((image[..., :3].max(-1) - image[..., :3].min(-1) > 0.2).sum()) for image in (one_run, all_runs)]
    assert coloured[1] > 1.5 * coloured[0] > 0
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["all.png"]


def test_reports_and_labels_that_cannot_be_plotted_are_named(tmp_path):
    a = report_file(tmp_path / "a.json", ("gumiho", 3, 0.0, [0.7, 0.5, 0.2]))
    (tmp_path / "no.json").write_text('{"runs": [{"method": "gumiho"}]}')
    with pytest.raises(FigureError, match="2 labels for 1 reports"):
        plot.read_runs([a], ["x", "y"], [], [])
    with pytest.raises(EvalError, match=r"a\.json: it has no run that drafts with the K"):
        plot.read_runs([a], [], [7], [])
    with pytest.raises(EvalError, match=r"no\.json: no report of"):
        plot.read_runs([tmp_path / "no.json"], [], [], [])
    with pytest.raises(FigureError, match="cannot be written"):
        plot.plot_acceptance(plot.read_runs([a], [], [], []), Path("/dev/null/x.png"))
