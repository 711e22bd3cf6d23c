"""The cost model of drafting and `vllm-gumiho plan`."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from vllm_gumiho.cli import app
from vllm_gumiho.errors import TuningError
from vllm_gumiho.tuning import inputs
from vllm_gumiho.tuning.theory import (
    StepTimes,
    acceptance_length,
    best,
    conditional,
    expected_accepted,
    options,
    sensitivity,
)

accuracy = st.floats(0, 1, allow_nan=False)
accuracies = st.lists(accuracy, min_size=2, max_size=10)


def test_expected_accepted_is_the_mean_of_simulated_drafts():
    p, draws = [0.8, 0.5, 0.9], random.Random(0)
    accepted = [sum(1 for _ in itertools.takewhile(lambda right: draws.random() < right, p)) for _ in range(40_000)]
    assert expected_accepted(p) == pytest.approx(0.8 + 0.8 * 0.5 + 0.8 * 0.5 * 0.9)
    assert sum(accepted) / len(accepted) == pytest.approx(expected_accepted(p), abs=0.03)
    assert acceptance_length(p) == 1 + expected_accepted(p)


@given(accuracies, st.data())
def test_theorem_3_1_earlier_accuracy_counts_more(p, data):
    """Accuracy moved from position j to an earlier i never lowers E, where none after j is more accurate than j."""
    i, j = sorted(data.draw(st.lists(st.integers(0, len(p) - 1), min_size=2, max_size=2, unique=True)))
    p = [*p[: j + 1], *(min(value, p[j]) for value in p[j + 1 :])]
    moved = data.draw(st.floats(0, min(p[j], 1 - p[i])))
    better = list(p)
    better[i] += moved
    better[j] -= moved
    assert sum(better) == pytest.approx(sum(p))
    assert expected_accepted(better) >= expected_accepted(p) - 1e-12


@given(accuracies)
def test_theorem_3_1_the_falling_order_is_accepted_furthest(p):
    assert expected_accepted(sorted(p, reverse=True)) >= expected_accepted(p) - 1e-12


def test_theorem_3_1_needs_its_condition():
    assert expected_accepted([1, 0, 1, 1, 1]) < expected_accepted([0.5, 0.5, 1, 1, 1])


@given(accuracies, st.data())
def test_sensitivity_is_the_derivative(p, data):
    position, step = data.draw(st.integers(0, len(p) - 1)), 0.01
    p[position] *= 1 - step
    raised = [*p[:position], p[position] + step, *p[position + 1 :]]
    slope = (expected_accepted(raised) - expected_accepted(p)) / step
    assert sensitivity(p)[position] == pytest.approx(slope, abs=1e-9)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=10))
def test_conditional_accuracies_come_back_from_marginal_ones(p):
    marginal = list(itertools.accumulate(p, lambda a, b: a * b))
    assert conditional(marginal) == pytest.approx(p)
    assert sum(marginal) == pytest.approx(expected_accepted(p))


def test_nothing_follows_a_position_that_is_never_accepted():
    assert conditional([0.5, 0.0, 0.0]) == [0.5, 0.0, 0.0]


def test_the_parts_of_a_step_add_up():
    times = StepTimes(target=10, verify=0.5, serial=2, heads=3)
    assert times.step(0, 0) == 10
    assert times.step(2, 5, batch=1) == 10 + 0.5 * 7 + 2 * 2 + 3
    assert times.step(2, 0, batch=4) == 10 + 0.5 * (4 * 3 - 1) + 2 * 2


def test_every_split_of_every_length_is_there_once():
    found = options([0.5] * 3, [0.4] * 3, StepTimes(10, 1, 1, 1))
    splits = [(option.serial, option.heads) for option in found]
    assert len(set(splits)) == len(splits)
    assert set(splits) == {(s, k - s) for k in range(4) for s in range(k + 1)}


def test_a_split_takes_serial_accuracy_first_and_head_accuracy_after():
    found = {(o.serial, o.heads): o for o in options([0.9, 0.8, 0.7], [0.6, 0.5, 0.4], StepTimes(10, 0, 1, 1), 2)}
    option = found[1, 2]
    assert option.accepted == pytest.approx(0.9 + 0.9 * 0.5 + 0.9 * 0.5 * 0.4)
    assert option.tokens_per_s == pytest.approx(1000 * 2 * (1 + option.accepted) / 12)
    assert option.speedup == pytest.approx(option.tokens_per_s / found[0, 0].tokens_per_s)


def test_a_trained_drafter_can_make_only_its_own_splits():
    found = options([0.9] * 5, [0.8] * 5, StepTimes(10, 0, 1, 1), serial_steps=2)
    assert [(o.serial, o.heads) for o in found] == [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize(
    ("times", "split"),
    [
        (StepTimes(10, 0.0, 0.1, 8.0), (4, 0)),
        (StepTimes(10, 0.0, 4.0, 0.5), (1, 3)),
        (StepTimes(10, 6.0, 4.0, 4.0), (0, 0)),
    ],
)
def test_the_best_split_follows_the_costs(times, split):
    """Cheap serial steps: all serial.  Dear ones: one, then heads.  Dear verification: no drafting."""
    option = best(options([0.8] * 4, [0.3, 0.7, 0.7, 0.7], times))
    assert (option.serial, option.heads) == split


def run_plan(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], catch_exceptions=True)


def test_plan_prints_json_and_plots(tmp_path):
    picture = tmp_path / "new" / "plan.png"
    done = run_plan("--acceptance", ".8,.6", "--step-times", "10,.1,1,1", "--json", "--plot", picture)
    report = json.loads(done.output)
    assert report["best"] == max(report["options"], key=lambda option: option["tokens_per_s"])
    assert len(report["options"]) == 1 + 2 + 3
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plan_marks_the_best_in_its_table():
    done = run_plan("--acceptance", ".8,.6,.5", "--step-times", "10,.1,1,1")
    assert done.exit_code == 0
    assert sum("best" in line.split("│")[-2] for line in done.output.splitlines() if line.startswith("│")) == 1


def test_plan_reads_times_from_a_file(tmp_path):
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"target": 10, "verify": 0.5, "serial": 2, "heads": 3}))
    assert inputs.step_times(str(file)) == inputs.step_times("10,.5,2,3") == StepTimes(10, 0.5, 2, 3)


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"acceptance_per_position": [0.5, 0.25]}, [0.5, 0.5]),
        ({"acceptance": [0.5, 0.4]}, [0.5, 0.4]),
        ({"conditional_accuracy_per_position": [0.5, None]}, [0.5, 0.0]),
        (
            {
                "runs": [
                    {"temperature": 0, "mean": {"acceptance_per_position": []}},
                    {"temperature": 0, "mean": {"acceptance_per_position": [0.4]}},
                    {"temperature": 1, "mean": {"acceptance_per_position": [0.1, 0.1, 0.1]}},
                    {"temperature": 0, "mean": {"acceptance_per_position": [0.8, 0.4]}},
                ]
            },
            [0.8, 0.5],
        ),
    ],
)
def test_plan_reads_accuracies_of_each_kind_of_report(tmp_path, report, expected):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    assert inputs.accuracies(file) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--acceptance", "1.2", "--step-times", "1,1,1,1"], "1.2 at position 1: give a number from 0 to 1"),
        (["--acceptance", "x", "--step-times", "1,1,1,1"], "--acceptance 'x': give numbers"),
        (["--acceptance", "nan", "--step-times", "1,1,1,1"], "nan at position 1"),
        (["--acceptance", ".5", "--step-times", "1,1,1"], "give four numbers in ms"),
        (["--acceptance", ".5", "--step-times", "0,1,1,1"], "target=0"),
        (["--acceptance", ".5", "--step-times", "1,-1,1,1"], "verify=-1.0"),
        (["--acceptance", ".5", "--step-times", "inf,1,1,1"], "target=inf"),
        (["--acceptance", ".5", "--step-times", "gone.json"], "gone.json: cannot be read"),
        (["--step-times", "1,1,1,1"], "give one of --acceptance, --from"),
        (["--acceptance", ".5", "--head-acceptance", ".5", "--step-times", "1,1,1,1"], "give one of --acceptance"),
        (["--acceptance", ".5", "--step-times", "1,1,1,1", "--batch", "0"], "batch 0"),
        (["--from", "/dev/null", "--step-times", "1,1,1,1"], "cannot be read as JSON"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, words):
    done = run_plan(*arguments)
    assert isinstance(done.exception, TuningError)
    assert words in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_report_without_acceptance_is_refused(tmp_path):
    file = tmp_path / "report.json"
    file.write_text('{"runs": []}')
    with pytest.raises(TuningError, match="no acceptance per position"):
        inputs.accuracies(file)
