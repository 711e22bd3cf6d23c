"""Choosing draft lengths from planted costs."""

from __future__ import annotations

import itertools
import math

import pytest
from fakes import measurement
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_gumiho.errors import TuningError
from vllm_gumiho.request.lengths import schedule_problem
from vllm_gumiho.tuning.measure import costs_of, record_of
from vllm_gumiho.tuning.schedule import Costs, choose, confident_schedule, in_words, ranges, row_cost
from vllm_gumiho.tuning.settings import Plan
from vllm_gumiho.tuning.verify import judged

SIZES = (1, 2, 4, 8)
ACCEPTANCE = [0.8, 0.7, 0.5]


def planted(verify: float, draft: float, idle: float = 0.1, acceptance=ACCEPTANCE) -> Costs:
    """10 ms a target pass, ``verify`` more for each draft token and request, ``draft`` for each draft step."""
    off = dict.fromkeys(SIZES, 10.0)
    on = {k: {b: 10 + (draft * k or idle) + verify * b * k for b in SIZES} for k in range(len(acceptance) + 1)}
    return Costs(off, on, acceptance)


def brute_force(costs: Costs, batch: int) -> int:
    accepted = [sum(math.prod(costs.acceptance[:i]) for i in range(1, k + 1)) for k in costs.on]
    return max(costs.on, key=lambda k: ((1 + accepted[k]) / costs.on[k][batch], -k))


def test_drafting_shrinks_as_checking_gets_dear():
    costs = planted(verify=0.5, draft=0.5)
    choice = choose(costs, margin=0)
    lengths = {size: next(k for first, last, k in choice.schedule if first <= size <= last) for size in SIZES}
    assert lengths == {size: brute_force(costs, size) for size in SIZES}
    assert lengths[1] == 3 > lengths[8]
    assert choice.schedule[-1] == [9, 9, 0]


def test_free_drafts_are_all_taken_up_to_what_was_measured():
    assert choose(planted(verify=0, draft=0.01)).schedule == [[1, 8, 3], [9, 9, 0]]


@pytest.mark.parametrize("acceptance", [[0.0, 0.0, 0.0], [0.05, 0.5, 0.5]])
def test_drafts_that_are_never_right_turn_speculation_off(acceptance):
    choice = choose(planted(verify=0.1, draft=2, acceptance=acceptance))
    assert (choice.schedule, choice.single) == (None, 0)
    assert "pays at no batch size" in choice.reason


def test_no_drafting_wins_ties_and_small_gains():
    """K = 1 gives 1.4 times the tokens: in 14 ms a tie with 10 ms, in 13.5 ms a gain of 3.7 %."""
    for step in (14.0, 13.5):
        costs = Costs({1: 10.0}, {0: {1: 10.0}, 1: {1: step}}, [0.4])
        assert choose(costs, margin=0.05).schedule is None
    assert choose(costs, margin=0.03).schedule == [[1, 1, 1], [2, 2, 0]]


def test_of_equal_lengths_the_smaller_is_taken():
    costs = Costs({1: 10.0}, {0: {1: 10.0}, 1: {1: 10.0}, 2: {1: 10.0}}, [0.5, 0.0])
    assert choose(costs).schedule == [[1, 1, 1], [2, 2, 0]]


def test_an_idle_drafter_that_costs_too_much_in_large_batches_turns_speculation_off():
    """Twice as fast alone, but 20 % behind at 8 even without drafts."""
    on = {0: {1: 10.1, 8: 12.5}, 1: {1: 8.0, 8: 40.0}}
    costs = Costs({1: 10.0, 8: 10.0}, on, [0.6])
    choice = choose(costs)
    assert choice.schedule is None
    assert "2.00x expected at batch size 1, but 0.80x at 8" in choice.reason
    assert choose(costs, max_loss=0.25).schedule[0][2] == 1


def test_what_an_idle_drafter_costs_above_the_measured_sizes_is_said():
    """Drafts pay at 8, the largest size, where K = 0 would lose 20 %: above it nothing is drafted."""
    costs = Costs({1: 10.0, 8: 10.0}, {0: {1: 10.1, 8: 12.5}, 1: {1: 10.2, 8: 12.6}}, [0.6])
    choice = choose(costs)
    assert choice.schedule == [[1, 8, 1], [9, 9, 0]]
    assert choice.above == "0.80x expected with K=0 at 8, under 0.95x"
    assert choose(costs, max_loss=0.25).above is None
    assert choose(planted(verify=0, draft=0.01)).above is None


def test_a_single_length_serves_where_no_schedule_can():
    assert choose(planted(verify=0.01, draft=0.1)).single == 3
    costs = planted(verify=2.0, draft=0.1)
    assert choose(costs).schedule[0][2] > 0
    assert choose(costs).single == 0, "every K loses at batch size 8"


def test_sizes_between_the_measured_ones_are_interpolated():
    costs = Costs({1: 10.0, 4: 10.0}, {0: {1: 10.0, 4: 10.0}, 1: {1: 10.0, 4: 19.0}}, [0.5])
    assert costs.speed(1, 2) == pytest.approx(1000 * 2 * 1.5 / 13)
    assert choose(costs, margin=0.01, max_loss=0).schedule == [[1, 2, 1], [3, 5, 0]]


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_ranges_say_what_the_lengths_said_to_vllm_too(lengths):
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    found = ranges(lengths)
    assert schedule_problem(found, 3) is None
    lookup = build_dynamic_sd_schedule_lookup(found, len(lengths) + 5, 3)
    assert lookup[1:] == [*lengths, *[0] * 5]
    assert all(a[2] != b[2] for a, b in itertools.pairwise(found))


def test_a_schedule_in_words():
    assert in_words([[1, 2, 7], [3, 3, 1], [4, 17, 0]]) == (
        "K=7 at batch size 1 to 2, K=1 at batch size 3, K=0 at batch size 4 and above"
    )


@pytest.mark.parametrize(
    "schedule",
    [
        None, {}, [], [[1, 2]], [[2, 3, 1]], [[1, 2, 4]], [[1, 2, -1]], [[1, 2, 1], [2, 3, 0]],
        [[2, 1, 1]], [["1", 2, 1]], [[1, 2, True]], [[1, 2.0, 1]], "x",
    ],
)  # fmt: skip
def test_a_bad_schedule_is_refused(schedule):
    problem = schedule_problem(schedule, 3)
    assert problem is not None
    assert "xpected" in problem


def test_a_length_goes_on_over_sizes_that_a_schedule_leaves_out():
    """vLLM's own rule."""
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    schedule = [[1, 2, 1], [4, 5, 0]]
    assert schedule_problem(schedule, 3) is None
    assert build_dynamic_sd_schedule_lookup(schedule, 6, 3)[1:] == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("off", "on", "acceptance"),
    [
        ({}, {}, []), ({2: 1.0}, {0: {2: 1.0}, 1: {2: 1.0}}, [0.5]), ({1: 1.0}, {1: {1: 1.0}}, [0.5]),
        ({1: 1.0}, {0: {1: 1.0}, 1: {1: 1.0, 2: 1.0}}, [0.5]), ({1: 1.0}, {0: {1: 1.0}, 1: {1: 1.0}}, []),
        ({1: 0.0}, {0: {1: 1.0}, 1: {1: 1.0}}, [0.5]), ({1: math.nan}, {0: {1: 1.0}, 1: {1: 1.0}}, [0.5]),
        ({1: 1.0}, {0: {1: 1.0}}, [0.5]),
    ],
)  # fmt: skip
def test_an_incomplete_measurement_is_refused(off, on, acceptance):
    with pytest.raises(TuningError):
        Costs(off, on, acceptance)


def test_costs_are_the_quietest_repeats_and_accepted_shares():
    costs = costs_of(measurement())
    assert costs.off == {1: 10.0, 2: 10.0}
    assert costs.on == {0: {1: 10.1, 2: 10.2}, 1: {1: 10.3, 2: 30.0}}
    assert costs.acceptance == [0.5]


@given(st.lists(st.floats(1, 50), min_size=6, max_size=6))
def test_noise_never_leaves_less_work_taking_longer(times):
    """Off, idle and K = 1, at 1 and 2: more drafts or more requests take at least as long."""
    noisy = measurement(off=tuple(times[:2]), idle=tuple(times[2:4]), one=tuple(times[4:]))
    costs = costs_of(noisy)
    rows = [costs.off, costs.on[0], costs.on[1]]
    assert all(row[1] <= row[2] for row in rows)
    assert all(less[size] <= more[size] for less, more in itertools.pairwise(rows) for size in (1, 2))
    assert all(row[size] <= raw for row, raw in zip(rows, times[::2], strict=True) for size in (1,))
    assert rows[2][2] == times[5]


def test_a_disturbed_off_time_cannot_turn_drafting_on():
    assert choose(costs_of(measurement(off=(90.0, 90.0), one=(20.0, 30.0)))).schedule is None


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])])
def test_batch_sizes_double_up_to_the_largest(most, sizes):
    assert Plan(max_batch=most).batches == sizes


@pytest.mark.parametrize(("row", "draft"), [(0.5, 1.0), (0.01, 4.0), (3.0, 0.0)])
def test_what_a_row_costs_comes_from_steps_of_long_drafts(row, draft):
    """20 ms a step, ``draft`` for drafting, ``row`` for each row: of drafts and, beyond the first, of requests."""
    on = {k: {b: 20 + (draft if k else 0) + row * (b * (k + 1)) for b in SIZES} for k in range(6)}
    found = row_cost(Costs(dict.fromkeys(SIZES, 20.0), on, [0.5] * 5))
    assert found == pytest.approx(row / (20 + draft), abs=2e-4)


def test_rows_that_cost_nothing_still_have_a_price():
    on = {k: dict.fromkeys(SIZES, 20.0) for k in range(4)}
    assert 0 < row_cost(Costs(dict.fromkeys(SIZES, 20.0), on, [0.5] * 3)) < 0.001


def test_drafts_by_request_are_tried_where_one_token_gains():
    dear = planted(verify=3.0, draft=0.5)
    assert [dear.speed(1, size) > dear.speed(0, size) for size in SIZES] == [True, True, False, False]
    assert confident_schedule(dear)[0] == [1, 2, 3]
    assert confident_schedule(dear)[-1][-1] == 0
    assert confident_schedule(planted(verify=20.0, draft=5.0)) is None


def met(*speeds: float) -> dict:
    """A record with a schedule for 1 and 2 requests after real ones ran at these shares of 10 and 20 tokens/s."""
    record = record_of({}, measurement(one=(10.3, 12.0)), 1, Plan(max_batch=2))
    assert record["schedule"] == [[1, 2, 1], [3, 3, 0]]
    off = {"1": [9.0, 10.0, 30.0], "2": [20.0, 20.0, 20.0]}
    line = {size: [speed * base, speed * base, 0.0] for size, speed, base in zip("12", speeds, (10, 20), strict=True)}
    return judged(record, {"off": off, "schedule": line}, Plan(max_batch=2))


def test_a_schedule_that_gains_in_real_requests_is_kept():
    record = met(1.2, 0.96)
    assert (record["schedule"], record["single"]) == ([[1, 2, 1], [3, 3, 0]], 1)
    assert record["reason"].endswith("expected over no speculation; 1.20x at 1, 0.96x at 2 measured")
    assert set(record["verified"]) == {"off", "schedule"}
    assert "withdrawn" not in record


@pytest.mark.parametrize(
    ("speeds", "words"),
    [
        ((1.2, 0.94), "1.20x measured at batch size 1, but 0.94x at 2, under 0.95x"),
        ((1.02, 0.96), "1.02x measured at batch size 1, but 0.99x on average"),
        ((0.99, 0.98), "the best measured is 0.99x at 1"),
    ],
)
def test_a_schedule_that_loses_in_real_requests_is_taken_back(speeds, words):
    record = met(*speeds)
    assert (record["schedule"], record["single"], record["above"]) == (None, 0, None)
    assert record["withdrawn"] == [[1, 2, 1], [3, 3, 0]]
    assert record["reason"].endswith(words)


def test_a_record_without_a_schedule_keeps_its_reason():
    record = record_of({}, measurement(), 1, Plan(max_batch=2)) | {"schedule": None, "reason": "planted"}
    found = judged(record, {"off": {"1": [1.0]}, "K=1": {"1": [2.0]}}, Plan(max_batch=2))
    assert (found["schedule"], found["reason"]) == (None, "planted")
