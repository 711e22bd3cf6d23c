"""Expected trees: against every tree and by simulation; times against their points; the words of the verdict."""

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
from vllm_gumiho.tuning.trees import Times, Tree, best_tree, choices, fastest, ranked_like, verdict

RATES = [[0.5, 0.2, 0.1], [0.4, 0.15, 0.05], [0.3, 0.1, 0.05]]
FLAT = Times(((1, 5.0), (1000, 5.0)), serial=0.5, heads=0.5)
rates_of = st.lists(st.lists(st.floats(0, 0.3), min_size=3, max_size=3), min_size=1, max_size=3)


def value(rates: list[list[float]], depth: int, leaves: tuple[tuple[int, int], ...]) -> float:
    """E by its definition: sum over depths of the chance that the walk gets there."""
    total, reached = 0.0, 1.0
    for position in range(1, depth + 1):
        beside = sum(rates[position - 1][rank - 1] for at, rank in leaves if at == position)
        total += reached * (rates[position - 1][0] + beside)
        reached *= rates[position - 1][0]
    return total


@given(rates_of, st.integers(1, 3), st.integers(0, 4))
def test_no_other_leaves_are_worth_more(rates, depth, count):
    depth = min(depth, len(rates))
    others = [(position, rank) for position in range(1, depth + 1) for rank in (2, 3)]
    found = best_tree(rates, depth, depth + count)
    if count > len(others):
        assert found is None
        return
    best = max(value(rates, depth, leaves) for leaves in itertools.combinations(others, count))
    assert found.nodes == depth + count
    assert found.accepted == pytest.approx(best)
    assert found.accepted == pytest.approx(value(rates, depth, found.leaves))


def test_the_expected_length_is_what_walks_through_the_tree_give():
    tree, dice = best_tree(RATES, 3, 7), random.Random(5)
    accepted, walks = 0, 200_000
    for _ in range(walks):
        for position, ranks in enumerate(RATES, 1):
            (rank,) = dice.choices([1, 2, 3, None], [*ranks, 1 - sum(ranks)])
            accepted += rank == 1 or (position, rank) in tree.leaves
            if rank != 1:
                break
    assert tree.accepted == pytest.approx(accepted / walks, abs=0.01)


def test_a_chain_is_the_spine_alone():
    chain = best_tree(RATES, 3, 3)
    assert chain == Tree(3, (), pytest.approx(0.5 + 0.2 + 0.06))
    assert chain.chain
    assert best_tree(RATES, 3, 2) is None
    assert best_tree(RATES, 3, 10) is None
    assert best_tree(RATES, 3, 5).leaves == ((1, 2), (1, 3))


def test_times_are_those_of_their_points_linear_between_and_behind():
    times = Times(((1, 5.0), (100, 5.0), (200, 9.0)), 0.0, 0.0)
    assert [times.pass_ms(rows) for rows in (1, 50, 100, 150, 200, 300)] == pytest.approx([5, 5, 5, 7, 9, 13])
    assert times.pass_ms(0) == 5.0


@pytest.mark.parametrize(
    "changes",
    [
        {"target": ((1, 5.0),)}, {"target": ((2, 5.0), (1, 6.0))}, {"target": ((1, 0.0), (2, 1.0))},
        {"target": ((1, 5.0), (1, 6.0))}, {"serial": -1.0}, {"heads": float("nan")}, {"extra": True},
    ],
)  # fmt: skip
def test_times_that_are_none_are_refused(changes):
    with pytest.raises(TuningError, match="give two or more pairs"):
        Times(**({"target": ((1, 5.0), (2, 5.0)), "serial": 0.5, "heads": 0.5} | changes))


@pytest.mark.parametrize("rates", [[], [[]], [[0.6, 0.6]], [[1.5]], [[-0.1]], [[float("nan")]], [[0.5], ["x"]]])
def test_rates_that_are_none_are_refused(rates):
    with pytest.raises(TuningError, match="rank hits"):
        choices(rates, FLAT)


def test_a_step_has_its_rows_its_drafting_and_what_a_tree_costs_beside():
    times = Times(((1, 5.0), (100, 5.0), (200, 10.0)), serial=1.0, heads=2.0, extra=0.25)
    found = choices(RATES, times, batches=(1, 20), nodes=(6,))
    off, *chains, tree = (one for one in found if one.batch == 20)
    assert (off.step_ms, off.tokens_per_s, off.over_off) == (5.0, 4000.0, 1.0)
    # 40, 60 and 80 rows are free; two serial steps, then the heads.
    assert [one.step_ms for one in chains] == [6.0, 7.0, 9.0]
    assert tree.step_ms == pytest.approx(5 + 2.0 + 2 * (tree.tree.depth > 2) + 0.25 + 2.0)
    assert tree.tokens_per_s == pytest.approx(1000 * 20 * (1 + tree.tree.accepted) / tree.step_ms)


def test_free_rows_are_a_tree_and_dear_rows_are_none():
    found = choices(RATES, FLAT, batches=(1, 4))
    assert fastest(found, 1, False).tree.nodes == 6
    assert verdict(found).startswith("A tree would pay against the best chain: +")
    assert verdict(found).endswith("; at every batch size.")
    dear = Times(((1, 5.0), (2, 10.0)), 0.5, 0.5)
    found = choices(RATES, dear, batches=(1, 4))
    assert fastest(found, 1, True).tree.nodes == 0
    assert verdict(found).startswith("A tree pays at no batch size: at best it is -")
    some = Times(((1, 5.0), (16, 5.0), (17, 9.0)), 0.5, 0.5)
    assert "; not at batch 16." in verdict(choices(RATES, some, batches=(1, 16)))


def test_misses_of_a_drafter_known_by_its_chain_are_ranked_as_anothers():
    found = ranked_like([0.8, 0.7], RATES)
    assert found[0] == pytest.approx([0.8, 0.2 * 0.2 / 0.5, 0.2 * 0.1 / 0.5])
    assert found[1] == pytest.approx([0.7, 0.3 * 0.15 / 0.6, 0.3 * 0.05 / 0.6])
    assert ranked_like([0.5], [[1.0, 0.0]]) == [[0.5, 0.0]]


def report(file, *runs: tuple[float, list]) -> str:
    content = [{"temperature": t, "mean": {"rank_hits": {"rates": rates}} if rates else {}} for t, rates in runs]
    file.write_text(json.dumps({"runs": content}))
    return str(file)


def test_rank_hits_are_those_of_the_longest_greedy_run_as_far_as_it_was_reached(tmp_path):
    unreached = [*RATES, [None] * 3, [0.0] * 3]
    file = report(tmp_path / "r.json", (1.0, RATES * 2), (0.0, RATES[:1]), (0.0, unreached), (0.0, []))
    assert inputs.rank_hits(tmp_path / "r.json") == RATES
    assert file


def plan(*arguments: str):
    return CliRunner().invoke(app, ["plan", "--trees", *arguments])


def test_plan_gives_a_table_json_and_a_picture(tmp_path):
    file = report(tmp_path / "r.json", (0.0, RATES))
    (tmp_path / "times.json").write_text('{"pass": [[1, 5], [100, 5], [256, 12]], "serial": 0.8, "heads": 0.6}')
    asked = ("--from", file, "--step-times", str(tmp_path / "times.json"), "--tree-extra", "0.5")
    done = plan(*asked, "--plot", str(tmp_path / "trees.png"))
    assert done.exit_code == 0, done.output
    assert "tree 8" in done.output
    assert "batch 16" in done.output
    assert (tmp_path / "trees.png").stat().st_size > 10_000
    found = json.loads(plan(*asked, "--json", "--concurrency", "2").output)
    assert found["verdict"].startswith("A tree ")
    assert {one["batch"] for one in found["choices"]} == {2}
    assert found["rates"] == RATES
    other = json.loads(plan(*asked, "--json", "--acceptance", ".9,.8").output)
    assert [ranks[0] for ranks in other["rates"]] == [0.9, 0.8]
    four = plan("--from", file, "--step-times", "25,10,1.5,1")
    assert "A tree pays at no batch size" in " ".join(four.output.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step-times", "1,1,1,1"], "--trees needs --from REPORT"),
        (["--step-times", "1,1,1,1", "--from", "HERE/none.json"], "no rank hits in it"),
        (["--step-times", "HERE/wrong.json", "--from", "HERE/r.json"], 'expected {"pass": [[rows, ms], ...]'),
        (["--step-times", "1,1,1,1", "--from", "HERE/r.json", "--concurrency", "0"], "whole numbers of at least 1"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, arguments, words):
    report(tmp_path / "r.json", (0.0, RATES))
    report(tmp_path / "none.json", (0.0, []))
    (tmp_path / "wrong.json").write_text('{"pass": [[1, 5], [2]], "serial": 1, "heads": 1}')
    done = plan(*(argument.replace("HERE", str(tmp_path)) for argument in arguments))
    assert isinstance(done.exception, TuningError)
    assert words in str(done.exception)
