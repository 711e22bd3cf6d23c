"""Mixture of Attentions in training: each draft position sees what it sees in use, on the text's tokens and its own."""

from __future__ import annotations

import copy

import pytest
import tiny
import tiny_moa
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from vllm_gumiho.drafters.moa.reference import ReferenceMoa
from vllm_gumiho.errors import RecipeError
from vllm_gumiho.training.block_objective import BlockObjective, hits, losses
from vllm_gumiho.training.blocks import Chains, Text, anchor_rows, own_chains
from vllm_gumiho.training.recipe import Recipe
from vllm_gumiho.training.recipes import objective_of
from vllm_gumiho.training.target import FrozenTarget
from vllm_gumiho.training.target_head import LmHead
from vllm_gumiho.training.unrolling import valid_anchors

# Two conversations in a row, then padding: prompts of 3, answers of the rest.
LENGTHS, T = (15, 9), 26
LAYERS = tiny_moa.LAYERS
BLOCK = 4


@pytest.fixture(scope="module")
def drafter():
    return tiny_moa.drafter().requires_grad_(False)


@pytest.fixture(scope="module")
def tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and LM head."""
    torch.manual_seed(3)
    return torch.randn(tiny.VOCAB, tiny.HIDDEN), torch.randn(tiny.VOCAB, tiny.HIDDEN)


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    segments, positions, answer = (torch.zeros(1, T, dtype=torch.long) for _ in range(3))
    start = 0
    for number, length in enumerate(LENGTHS, 1):
        here = slice(start, start + length)
        segments[0, here], positions[0, here] = number, torch.arange(length)
        answer[0, start + 3 : start + length] = 1
        start += length
    ids = torch.randint(0, tiny.VOCAB, (1, T)) * (segments > 0)
    return {"input_ids": ids, "segments": segments, "positions": positions, "answer": answer.bool()}


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    """Last hidden states, and states of the layers read."""
    torch.manual_seed(2)
    return torch.randn(1, T, (1 + len(LAYERS)) * tiny.HIDDEN)


@pytest.fixture(scope="module")
def text(drafter, tables, batch, features) -> Text:
    return Text.of(drafter, tables[0], batch, features[..., tiny.HIDDEN :])


@pytest.fixture(scope="module")
def reference(drafter, tables) -> ReferenceMoa:
    return tiny_moa.equations(drafter.config, drafter.state_dict(), *tables)


def from_anchor(reference, batch, features, row: int, length: int, own: bool = False):
    """What the equations draft after x[row+1]: tokens and hidden states; on the text's tokens unless ``own``."""
    start = row - int(batch["positions"][0, row])
    held = features[0, start : row + 1, tiny.HIDDEN :].unflatten(-1, (len(LAYERS), -1))
    ids = batch["input_ids"][0]
    follow = None if own else ids[row + 2 : row + 2 + length].tolist()
    return reference.draft(ids[start : row + 2], held, length, follow)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_every_depth_of_a_block_is_what_the_equations_draft_from_its_anchor(text, reference, batch, features):
    torch.manual_seed(0)
    anchors = anchor_rows(batch, (BLOCK, BLOCK), shifted=True)
    drafted = text.drafted(text.tokens(), anchors)
    rows = torch.arange(T)
    depths = set()
    for anchor in anchors[0, : sum(LENGTHS)].unique().tolist():
        block = rows[: sum(LENGTHS)][anchors[0, : sum(LENGTHS)] == anchor]
        _, wanted = from_anchor(reference, batch, features, anchor, len(block))
        close(drafted[0, block], wanted)
        depths |= set((block - anchor + 1).tolist())
    assert depths == set(range(1, BLOCK + 1))


def test_own_tokens_are_what_the_equations_draft_on_their_own(text, reference, tables, batch, features):
    anchors = torch.tensor([[2, 6, 7, 17, -1]])
    chains = own_chains(
        text, anchors, text.drafted(text.tokens(), torch.arange(T)[None]), 4, lambda x: argmax(x, tables)
    )
    drafted = Chains(text, anchors, chains.tokens).drafted()
    assert chains.real.tolist() == [[True, True, True, True, False]]
    for number, anchor in enumerate(anchors[0, :-1].tolist()):
        tokens, wanted = from_anchor(reference, batch, features, anchor, 5, own=True)
        assert chains.tokens[0, number].tolist() == tokens[:4]
        close(drafted[0, number], wanted[1:])
        assert tokens[0] != batch["input_ids"][0, anchor + 2], "a right draft does not tell own tokens from true ones"


def argmax(x: torch.Tensor, tables) -> torch.Tensor:
    return (x @ tables[1].T).argmax(-1)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tiny.write_target(tmp_path_factory.mktemp("target"), num_hidden_layers=tiny_moa.TARGET_LAYERS)
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def test_the_target_judges_own_tokens_as_if_they_were_the_text(text, batch, target):
    frozen = FrozenTarget(target[1])
    anchors, tokens = torch.tensor([[3, 7, 18, -1]]), torch.randint(0, tiny.VOCAB, (1, 4, 3))
    judged = Chains(text, anchors, tokens).judged(frozen)
    for number, anchor in enumerate(anchors[0, :-1].tolist()):
        start = anchor - int(batch["positions"][0, anchor])
        whole = torch.cat((batch["input_ids"][0, start : anchor + 2], tokens[0, number]))
        with torch.no_grad():
            wanted = target[1].model(whole[None]).last_hidden_state[0, -3:]
        close(judged[0, number], wanted)


@pytest.mark.parametrize("change", [{"layer_types": ["sliding_attention"] * 4}, {"sliding_window": 8}])
def test_a_target_of_windows_judges_no_own_tokens(text, target, change):
    frozen = FrozenTarget(copy.deepcopy(target[1]), name="TARGET")
    for name, value in change.items():
        setattr(frozen.model.config, name, value)
    with pytest.raises(RecipeError, match=r"own_tokens: target TARGET attends in another way .* train without --own"):
        Chains(text, torch.tensor([[3]]), torch.tensor([[[5, 6]]])).judged(frozen)


def test_states_are_those_at_the_layers_inputs_and_are_stored(tmp_path, batch, target):
    folder, model = target
    found = FrozenTarget(model, layers=LAYERS).features(batch)
    states = tiny_moa.TargetStates(folder, LAYERS)
    for start, length in ((0, 15), (15, 9)):
        tokens = batch["input_ids"][0, start : start + length].tolist()
        close(found[0, start : start + length, tiny.HIDDEN :], states.states(tokens).flatten(1))
        with torch.no_grad():
            close(
                found[0, start : start + length, : tiny.HIDDEN],
                model.model(torch.tensor([tokens])).last_hidden_state[0],
            )
    FrozenTarget(model, tmp_path).features(batch)
    for _ in range(2):
        stored = FrozenTarget(model, tmp_path, layers=LAYERS).features(batch)
        assert stored.dtype == torch.bfloat16
        torch.testing.assert_close(stored.float(), found, rtol=2**-8, atol=1e-6)
    assert len(list(tmp_path.glob("*.features"))) == 2


@pytest.mark.parametrize("shifted", [False, True])
def test_anchors_are_every_row_of_prompts_and_one_in_a_block_of_answers(batch, shifted):
    torch.manual_seed(4)
    many = {name: value.repeat(50, 1) for name, value in batch.items()}
    anchors = anchor_rows(many, (3, 5), shifted)
    rows = torch.arange(T).expand_as(anchors)
    assert (many["segments"].gather(1, anchors) == many["segments"]).all()
    inside = many["answer"] & torch.roll(many["answer"], -1, 1) & (many["segments"] > 0)
    assert (anchors == rows)[~inside].all()
    assert (rows - anchors).max() == 4
    firsts = {
        tuple(sorted(set(line[(at == rows[0]) & keep].tolist())))
        for line, at, keep in zip(many["positions"], anchors, inside & (many["segments"] == 1), strict=True)
    }
    # Multiples of 3, 4 or 5; else any of their shifts.
    assert len(firsts) == (12 if shifted else 3)


def entropy(x, labels, tables) -> torch.Tensor:
    """Cross-entropy of draft rows against the target's distributions, ``[N]``."""
    p = F.linear(labels, tables[1]).softmax(-1)
    return -(p * F.linear(x, tables[1]).log_softmax(-1)).sum(-1)


def test_the_loss_weighs_depths_and_anchors_as_it_says(monkeypatch, drafter, text, tables, batch, features):
    objective = BlockObjective(block=(3, 3), chain_floor=0.2, serial_decay=0.5, feature_weight=0.0)
    anchors = torch.arange(T)[None] // 3 * 3
    anchors[0, 15:17] = torch.tensor([15, 16])
    monkeypatch.setattr("vllm_gumiho.training.block_objective.anchor_rows", lambda *_: anchors)
    total, parts = losses(drafter, objective, tables[0], LmHead(tables[1]), batch, features, torch.arange(4), 0.0, None)
    x, hidden, ids = text.tokens(), features[0, :, : tiny.HIDDEN], batch["input_ids"][0]
    by_block, at_once = text.drafted(x, anchors)[0], text.drafted(x, torch.arange(T)[None])[0]
    wanted = 0.0
    for depth in (1, 2, 3):
        terms, weights = [], []
        for row in valid_anchors(batch["segments"], batch["answer"], depth)[0].nonzero()[:, 0].tolist():
            last = row + depth - 1
            if depth > 1 and not (anchors[0, row] == row and anchors[0, last] == row):
                continue
            drafted = at_once if depth == 1 else by_block
            terms.append(entropy(drafted[last], hidden[last + 1], tables))
            held = 1.0
            for before in range(depth - 1):
                rows = at_once if before == 0 else by_block
                held *= float(F.linear(rows[row + before], tables[1]).softmax(-1)[ids[row + before + 2]])
            weights.append(0.2 + 0.8 * held)
        mean = sum(w * float(t) for w, t in zip(weights, terms, strict=True)) / sum(weights)
        assert len(terms) == {1: 16, 2: 4, 3: 4}[depth]
        assert float(parts[f"ce_{depth}"]) == pytest.approx(mean, rel=1e-4)
        wanted += 0.5 ** (depth - 1) * mean
    assert float(total) == pytest.approx(wanted, rel=1e-4)


def test_own_tokens_are_weighed_by_what_the_target_keeps(monkeypatch, drafter, text, tables, batch, features):
    """All anchors go on with their own tokens: the loss after the first position is by hand, from the same chains."""

    class Judge:
        """Tells each token's own vector, so that what it judges is known."""

        def masked(self, ids, positions, sees):
            return F.embedding(ids, tables[0])

    objective = BlockObjective(block=(3, 3), chain_floor=0.2, serial_decay=0.5, feature_weight=1.0)
    made = []
    monkeypatch.setattr(
        "vllm_gumiho.training.block_objective.own_chains", lambda *a: made.append(own_chains(*a)) or made[-1]
    )
    torch.manual_seed(5)
    total, parts = losses(
        drafter, objective, tables[0], LmHead(tables[1]), batch, features, torch.arange(4), 1.0, Judge()
    )
    (chains,) = made
    drafted = Chains(text, chains.anchors, chains.tokens[..., :-1]).drafted()
    hidden = features[0, :, : tiny.HIDDEN]
    sums = {2: [0.0, 0.0], 3: [0.0, 0.0]}
    for number, anchor in enumerate(chains.anchors[0].tolist()):
        tokens = chains.tokens[0, number]
        kept = F.linear(hidden[anchor + 1], tables[1]).softmax(-1)[tokens[0]]
        for depth in (2, 3):
            label = tables[0][tokens[depth - 2]]
            weight = 0.2 + 0.8 * float(kept)
            sums[depth][0] += weight * float(entropy(drafted[0, number, depth - 2], label, tables))
            sums[depth][1] += weight
            kept = kept * F.linear(label, tables[1]).softmax(-1)[tokens[depth - 1]]
    assert chains.anchors.shape[1] > 4
    for depth in (2, 3):
        assert float(parts[f"ce_{depth}"]) == pytest.approx(sums[depth][0] / sums[depth][1], rel=1e-4)
    assert float(total) == pytest.approx(
        sum(0.5 ** (i - 1) * float(parts[f"ce_{i}"] + parts[f"feature_{i}"]) for i in (1, 2, 3)), rel=1e-4
    )


def test_hits_are_counted_from_every_token_of_an_answer(drafter, reference, tables, batch, features):
    ids = batch["input_ids"].clone()
    # A text that the drafter gets right now and then: its own drafts after some anchors.
    for row in (5, 6, 18):
        tokens, _ = from_anchor(reference, batch | {"input_ids": ids}, features, row, 3, own=True)
        ids[0, row + 2 : row + 4] = torch.tensor(tokens[:2])
    batch = batch | {"input_ids": ids}
    found = torch.stack(hits(drafter, tables[0], LmHead(tables[1]), batch, features))
    wanted = torch.zeros_like(found)
    depths = [valid_anchors(batch["segments"], batch["answer"], depth)[0] for depth in range(1, found.shape[1] + 1)]
    for row in depths[0].nonzero()[:, 0].tolist():
        reached = sum(bool(valid[row]) for valid in depths)
        tokens, _ = from_anchor(reference, batch, features, row, reached)
        right = [token == following for token, following in zip(tokens, ids[0, row + 2 :].tolist(), strict=False)]
        for depth in range(reached):
            wanted[:, depth] += torch.tensor([1, int(right[depth]), int(all(right[: depth + 1]))])
    assert found.tolist() == wanted.tolist()
    assert 0 < wanted[2, 1] < wanted[1].sum()


@pytest.mark.parametrize(("recipe", "reached"), [("moa", 7), ("moa-paper", 14)])
def test_the_recipes_train_the_depths_that_they_say(drafter, tables, recipe, reached):
    count, length = 30, 40
    ids = torch.randint(0, tiny.VOCAB, (count, length))
    positions = torch.arange(length).expand(count, -1)
    batch = {"input_ids": ids, "positions": positions, "segments": torch.ones_like(ids), "answer": positions > 2}
    features = torch.randn(count, length, (1 + len(LAYERS)) * tiny.HIDDEN)
    objective = objective_of(Recipe("target", ["data"], "run", recipe=recipe, candidates=0))
    torch.manual_seed(1)
    _, parts = losses(drafter, objective, tables[0], LmHead(tables[1]), batch, features, torch.arange(4), 0.0, None)
    assert max(int(name.split("_")[1]) for name in parts) == reached
