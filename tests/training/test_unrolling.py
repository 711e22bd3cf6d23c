"""What later draft positions see in training: their own anchor alone; the tokens they are fed, and what they weigh."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from reference_drafter import ReferenceDrafter
from runs import unrolled

from vllm_gumiho.drafters.gumiho.trainable import GumihoDrafter
from vllm_gumiho.training.model import TrainingModel
from vllm_gumiho.training.objective import Objective, losses
from vllm_gumiho.training.target_head import LmHead
from vllm_gumiho.training.unrolling import Drafts, draft

LENGTH = 14
ANCHORS = (2, 3, 6, 10)


@pytest.fixture
def drafter() -> GumihoDrafter:
    drafter = GumihoDrafter(tiny.drafter_config())
    drafter.load_state_dict(tiny.drafter_tensors())
    with torch.no_grad():
        for layer in drafter.layers:
            # Large enough that attending to a wrong key shows.
            layer.self_attn.o_proj.weight.mul_(10)
    return drafter


@pytest.fixture
def text() -> dict[str, torch.Tensor]:
    """One row of one answer: random tokens of random embeddings, random target features."""
    torch.manual_seed(1)
    answer = torch.ones(1, LENGTH, dtype=torch.bool)
    answer[0, :2] = False
    return {
        "embed": torch.randn(tiny.VOCAB, tiny.HIDDEN),
        "input_ids": torch.randint(0, tiny.VOCAB, (1, LENGTH)),
        "features": torch.randn(1, LENGTH, tiny.HIDDEN),
        "positions": torch.arange(LENGTH)[None],
        "segments": torch.ones(1, LENGTH, dtype=torch.long),
        "answer": answer,
    }


def drafted(drafter, text, anchors, **how) -> torch.Tensor:
    """Draft features ``[anchors, K, H]``, going on from the drafter's own tokens."""
    at = torch.zeros(1, LENGTH, dtype=torch.bool)
    at[0, list(anchors)] = True
    inputs = (text["input_ids"], text["features"], text["positions"], text["segments"])
    with torch.no_grad():
        out = draft(drafter, text["embed"], *inputs, at, own_token=lambda f, _: (f @ text["embed"].T).argmax(-1), **how)
    return torch.stack((*out.serial, *out.heads, *out.further), dim=1)


def test_many_anchors_in_one_pass_draft_what_the_equations_draft_from_each(drafter, text):
    reference = ReferenceDrafter(
        weights=drafter.state_dict(),
        embed=text["embed"],
        lm_head=text["embed"],
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope_theta=10000.0,
        eps=1e-5,
    )
    computed = drafted(drafter, text, ANCHORS)
    for anchor, features in zip(ANCHORS, computed, strict=True):
        tokens, wanted = reference.draft(text["input_ids"][0, : anchor + 2], text["features"][0, : anchor + 1])
        torch.testing.assert_close(features, torch.stack(wanted), rtol=1e-4, atol=1e-4)
        assert (features @ text["embed"].T).argmax(-1).tolist() == tokens
        assert tokens[0] != text["input_ids"][0, anchor + 2], "a right draft does not tell own tokens from true ones"


def test_an_anchor_does_not_see_what_another_has_drafted(drafter, text):
    together = drafted(drafter, text, ANCHORS, further=2)
    alone = torch.cat([drafted(drafter, text, [anchor], further=2) for anchor in ANCHORS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def second_inputs(monkeypatch, drafter, text, run) -> torch.Tensor:
    """Tokens that the second serial step is fed at its anchors while ``run()`` runs."""
    fed, fuse = [], drafter.fuse
    with monkeypatch.context() as patch:
        patch.setattr(drafter, "fuse", lambda embeds, features: fed.append(embeds) or fuse(embeds, features))
        run()
    # The first input is the whole row's.
    return torch.cdist(fed[1], text["embed"]).argmin(-1)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_of_own_tokens_decides_what_the_second_step_is_fed(monkeypatch, drafter, text, share):
    batch = {name: text[name].repeat(40, 1) for name in ("input_ids", "positions", "segments", "answer")}
    features = text["features"].repeat(40, 1, 1)
    torch.manual_seed(0)
    fed = second_inputs(
        monkeypatch,
        drafter,
        text,
        lambda: losses(
            drafter,
            unrolled(candidates=0),
            text["embed"],
            LmHead(text["embed"]),
            batch,
            features,
            torch.arange(4),
            share,
        ),
    )
    # Anchors draft the answer's second token or a later one: x[t+2] for t from 1.
    true = text["input_ids"][0, 3:]
    own = (drafted(drafter, text, range(1, LENGTH - 2))[:, 0] @ text["embed"].T).argmax(-1)
    assert (true != own).all()
    fed = fed.view(40, -1)
    assert fed.shape[1] == len(true)
    assert ((fed == own) | (fed == true)).all()
    # 440 anchors: chance moves a half by .024.
    assert (fed == own).float().mean().item() == pytest.approx(share, abs=0.1 if share == 0.5 else 0)


def test_own_tokens_come_in_as_training_goes_on(monkeypatch, drafter, text):
    class Target:
        embed, lm_head = text["embed"], LmHead(text["embed"])

    model = TrainingModel(drafter, unrolled(candidates=0), Target(), torch.arange(4), own_tokens=1.0)
    true = text["input_ids"][0, 3:]
    shares = []
    for progress in (0.0, 1.0):
        model.progress = progress
        fed = second_inputs(monkeypatch, drafter, text, lambda: model.training_losses(text, text["features"]))
        shares.append((fed == true).float().mean().item())
    assert shares == [1.0, 0.0]


def test_anchors_weigh_by_the_drafters_hold_on_the_true_tokens_before(monkeypatch):
    """Two tokens, of which 0 is always true, and LM head I: features are logits, so every term is known by hand."""

    def logits(*chances):
        return torch.tensor([[chance, 1 - chance] for chance in chances]).log()

    # The drafter's chances of token 0 at four anchors; where an anchor's answer has ended they must not matter.
    first, second, third = (0.9, 0.1, 0.5, 0.5), (0.8, 0.5, 0.6, 0.01), (0.7, 0.3, 0.01, 0.01)
    drafts = Drafts([logits(*first), logits(*second)], logits(*third)[None])
    monkeypatch.setattr("vllm_gumiho.training.objective.draft", lambda *args: drafts)
    target = (0.5, 0.9, 0.75, 0.25, 0.6, 0.5)
    answer = torch.ones(1, 6, dtype=torch.bool)
    answer[0, 0] = False
    batch = {
        "input_ids": torch.zeros(1, 6, dtype=torch.long),
        "segments": torch.ones(1, 6, dtype=torch.long),
        "answer": answer,
        "positions": torch.arange(6)[None],
    }
    objective = Objective(feature_weight=0.0, chain_floor=0.2, serial_decay=0.5, head_weights=(0.1,))
    total, parts = losses(
        None, objective, torch.eye(2), LmHead(torch.eye(2)), batch, logits(*target)[None], torch.arange(1)
    )

    def entropy(q, p):
        return -q * math.log(p) - (1 - q) * math.log(1 - p)

    # 0.2 + 0.8 times what came before: nothing; .9, .1, .5; .9 * .8, .1 * .5.
    weights = [(1.0, 1.0, 1.0, 1.0), (0.92, 0.28, 0.6), (0.776, 0.24)]
    wanted = [
        sum(w * entropy(q, p) for w, q, p in zip(weight, target[i:], mine, strict=False)) / sum(weight)
        for i, (weight, mine) in enumerate(zip(weights, (first, second, third), strict=True), 1)
    ]
    assert [float(parts[f"ce_{i}"]) for i in (1, 2, 3)] == pytest.approx(wanted, rel=1e-5)
    assert float(total) == pytest.approx(wanted[0] + 0.5 * wanted[1] + 0.1 * wanted[2], rel=1e-5)
