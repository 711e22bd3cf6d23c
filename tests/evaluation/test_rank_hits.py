"""``eval --rank-hits``: counts by hand, and of real engines against the plain reference and vLLM's own counters."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import predictable
import pytest
import torch
from engines import environment
from many_gumiho import plain_target, reference_of
from places import PROCESSES
from predictable import encode

from vllm_gumiho.evaluation.plot import plot_ranks
from vllm_gumiho.evaluation.rank_hits import RANKS, RankHits, add_up

PROMPTS = [encode(text) for text in ("abc", "q{Z!", "12 ", "The quick", "x~3Y", "ABCDEFGH")]


def counted(*drafts: tuple[list[list[int]], list[int]], length: int = 3) -> dict:
    hits = RankHits(length)
    for choices, truth in drafts:
        hits.add(choices, truth)
    return hits.plain()


def test_ranks_are_counted_where_all_before_were_right():
    choices = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    found = counted((choices, [1, 5, 7, 0]), (choices, [1, 4, 9]), (choices, [2, 4, 7]), (choices, [0, 4, 7]))
    assert found["reached"] == [4, 2, 1]
    assert [ranks[:3] for ranks in found["hits"]] == [[2, 1, 0], [1, 1, 0], [0, 0, 1]]
    # Behind rank 2 at position 1 the first choice of position 2 was right; behind rank 2 at position 2 that of 3.
    assert found["after_sibling"] == [[1, 1], [1, 1]]
    assert all(len(ranks) == RANKS for ranks in found["hits"])


def test_a_text_that_ends_in_a_draft_counts_as_far_as_it_is_known():
    choices = [[1, 2], [3, 4], [5, 6]]
    found = counted((choices, [1]), (choices, [2]), (choices, []))
    assert found["reached"] == [2, 0, 0]
    assert found["after_sibling"] == [[0, 0], [0, 0]]


def test_sets_weigh_alike_in_rates_and_their_counts_add_up():
    choices = [[1, 2], [3, 4], [5, 6]]
    one, other = counted((choices, [1, 3, 6])), counted(*[(choices, [2, 0])] * 9)
    total = add_up([one, other])
    assert total["reached"] == [10, 1, 1]
    assert total["rates"][0][:2] == [0.5, 0.5]
    assert total["rates"][2][:2] == [0.0, 1.0]
    assert total["after_sibling"] == [[9, 0], [0, 0]]
    nothing = add_up([counted(([[1]], [2]), length=2)])
    assert nothing["rates"] == [[0.0] * RANKS, [None] * RANKS]


def test_the_picture_has_a_panel_a_run(tmp_path):
    from matplotlib.image import imread

    rates = [[0.5, 0.2, *[0.05] * 6], [0.4, *[0.05] * 7], [None] * RANKS]
    run = {"mean": {"rank_hits": {"rates": rates, "reached": [9, 4, 0]}}}
    plot_ranks([("ours", run)], tmp_path / "one.png")
    plot_ranks([("ours", run), ("other", run)], tmp_path / "two.png")
    one, two = (imread(tmp_path / name)[..., :3] for name in ("one.png", "two.png"))
    coloured = [int((image.max(-1) - image.min(-1) > 0.2).sum()) for image in (one, two)]
    assert min(coloured) > 1000


@pytest.fixture(scope="module", params=["v1", pytest.param("v2", marks=pytest.mark.long)])
def watched(tmp_path_factory, request):
    """What an engine's drafts chose from, with the models' folders."""
    folder = tmp_path_factory.mktemp("ranks")
    target, checkpoint = predictable.write_target(folder / "target"), predictable.write_checkpoint(folder / "gumiho")
    llm = {
        "model": str(target),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "disable_log_stats": False,
        "speculative_config": {"method": "gumiho", "model": str(checkpoint)},
    }
    (folder / "llm.json").write_text(json.dumps(llm))
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    files = [str(folder / name) for name in ("llm.json", "prompts.json", "out.json")]
    command = [sys.executable, str(PROCESSES / "ranks_main.py"), request.param, *files]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(Path(files[-1]).read_text()), target, checkpoint


@pytest.mark.engine
def test_first_choices_are_the_drafts_that_vllm_accepted(watched):
    """But for each request's last draft, which may go on behind the end of its text."""
    found, _, _ = watched
    hits = found["hits"]
    assert found["counts"]["drafts"] - len(PROMPTS) <= hits["reached"][0] <= found["counts"]["drafts"]
    for position, accepted in enumerate(found["accepted"]):
        assert accepted - len(PROMPTS) <= hits["hits"][position][0] <= accepted
        following = [*hits["reached"][1:], None][position]
        assert following is None or following <= hits["hits"][position][0]
    assert sum(ranks[0] for ranks in hits["hits"]) > 0
    assert sum(sum(ranks[1:]) for ranks in hits["hits"]) > 0, "no second choice was ever right"


@pytest.mark.engine
@torch.no_grad()
def test_the_choices_are_the_references_best_logits(watched):
    found, target, checkpoint = watched
    reference, model = reference_of(target, checkpoint), plain_target(target)
    compared: Counter[int] = Counter()
    for choices, truth in found["seen"]:
        places = [(text, len(text) - len(truth)) for text in found["texts"] if text[len(text) - len(truth) :] == truth]
        if len(places) > 1:
            continue  # requests' texts end alike: whose draft it is is not told
        ((text, length),) = places
        tokens, drafted = torch.tensor(text[:length]), torch.tensor([[ranked[0] for ranked in choices]])
        features = model.model(tokens[None, :-1]).last_hidden_state[0]
        (logits,) = reference.logits(tokens, features, torch.tensor([length]), drafted)
        for position, ranked in enumerate(choices):
            best = logits[position].topk(RANKS).values
            assert torch.allclose(logits[position][torch.tensor(ranked)], best, atol=1e-3)
            compared[position] += 1
    assert min(compared[position] for position in range(7)) > len(found["seen"]) / 2 > 10
