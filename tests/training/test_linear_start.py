"""The closed-form start: the fit is least squares, the drafter drafts it, and training does not lose it at once."""

from __future__ import annotations

import json
import random

import pytest
import tiny
import torch
from runs import recipe
from safetensors.torch import load_file

from vllm_gumiho.training import start
from vllm_gumiho.training.data import PackedRows, Sample
from vllm_gumiho.training.optimizer import MuonWithAdamW, apart
from vllm_gumiho.training.recipe import FITTED_RATE
from vllm_gumiho.training.recipes import new_drafter
from vllm_gumiho.training.start import RidgeRegression, start_linear
from vllm_gumiho.training.trainer import train
from vllm_gumiho.training.unrolling import draft, valid_anchors

CPU = torch.device("cpu")


def test_streamed_ridge_regression_is_least_squares(monkeypatch):
    torch.manual_seed(0)
    # Inputs of very different sizes, as embeddings and features are; one is always zero.
    x = torch.randn(300, 12) * torch.logspace(-2, 2, 12)
    x[:, 5] = 0
    y = torch.randn(300, 4) + x[:, :4]
    fit = RidgeRegression(12, 4, CPU)
    for part in range(0, 300, 70):
        fit.add(x[part : part + 70], y[part : part + 70])
    assert fit.rows == 300
    x, y = x.double(), y.double()
    for ridge in (1e-3, 0.1):
        monkeypatch.setattr(start, "RIDGE", ridge)
        # Ridge is least squares with rows that ask for coefficients of zero.
        asked = (ridge * x.square().sum(0)).sqrt().diag()
        wanted = torch.linalg.lstsq(torch.cat((x, asked)), torch.cat((y, torch.zeros(12, 4))), driver="gelsd").solution
        torch.testing.assert_close(fit.solve(), wanted, rtol=1e-4, atol=1e-6)
    assert not fit.solve()[5].any()


@pytest.fixture
def world():
    """Rows of conversations whose features are a linear function of the token and the feature before."""
    torch.manual_seed(0)
    rng = random.Random(0)
    embed = torch.randn(tiny.VOCAB, tiny.HIDDEN)
    a, b = (torch.randn(tiny.HIDDEN, tiny.HIDDEN) * 0.1 for _ in range(2))
    offset = torch.randn(tiny.HIDDEN)

    def tokens(count):
        return [rng.randrange(tiny.VOCAB) for _ in range(count)]

    samples = [Sample(f"s{i}", ((tokens(4), tokens(rng.randrange(3, 30))),)) for i in range(60)]

    def features_of(batch):
        out = torch.zeros(*batch["input_ids"].shape, tiny.HIDDEN)
        for row, (ids, places) in enumerate(zip(batch["input_ids"], batch["positions"], strict=True)):
            for t, (token, place) in enumerate(zip(ids, places, strict=True)):
                before = out[row, t - 1] if place > 0 else torch.zeros(tiny.HIDDEN)
                out[row, t] = embed[token] @ a + before @ b + offset
        return out

    return PackedRows(samples, 64), embed, features_of, torch.cat((a.T, b.T), dim=1), offset


def drafter_of(target, folder, name="unrolled", **changes):
    """An initialised drafter of a recipe."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(target)
    drafter = new_drafter(recipe(target, "d", folder, recipe=name, **changes), config)
    drafter.init_weights(1.0, 1.0)
    return drafter


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_fit_finds_the_map_that_made_the_features(monkeypatch, world, tmp_path, tiny_target, at_once):
    monkeypatch.setattr(start, "RIDGE", 1e-9)
    monkeypatch.setattr(start, "_rows_at_once", lambda device: at_once)
    rows, embed, features_of, weight, offset = world
    drafter = drafter_of(tiny_target, tmp_path)
    seen = start_linear(drafter, rows, embed, features_of, 10**6)
    assert seen == sum(int(valid_anchors(*(row[n][None] for n in ("segments", "answer")), 1).sum()) for row in rows)
    torch.testing.assert_close(drafter.fc.weight.detach(), weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(drafter.fc.bias.detach(), offset, rtol=1e-3, atol=1e-3)
    # EAGLE-1's fc has no bias; and a fit may be told how much to read.
    drafter = drafter_of(tiny_target, tmp_path, "eagle")
    some = start_linear(drafter, rows, embed, features_of, 40)
    assert drafter.fc.bias is None
    assert 40 <= some < seen


def test_a_first_step_that_reads_layers_is_fitted_on_them(monkeypatch, world, tmp_path, tiny_target):
    """As good as least squares with an ``fc`` of its own, where a state knows of what the feature does not."""
    monkeypatch.setattr(start, "RIDGE", 1e-9)
    monkeypatch.setattr(start, "OWN_FEATURE", 1e-9)
    _, embed, _, weight, offset = world
    rng = random.Random(1)
    texts = [[rng.randrange(tiny.VOCAB) for _ in range(24)] for _ in range(400)]
    rows = PackedRows([Sample(f"s{i}", ((text[:4], text[4:]),)) for i, text in enumerate(texts)], 64)
    a, b = weight[:, : tiny.HIDDEN].T, weight[:, tiny.HIDDEN :].T
    told, mixed = torch.randn(512, tiny.HIDDEN), torch.randn(tiny.HIDDEN, tiny.HIDDEN)

    def unit(x):
        return x / x.square().mean(-1, keepdim=True).sqrt()

    def held_of(batch):
        """Features of unit size, behind them a state of that direction, and one that makes up half of what is next."""
        h = torch.zeros(*batch["input_ids"].shape, tiny.HIDDEN)
        extra = unit(told[(batch["input_ids"] * 7 + batch["positions"]) % 512])
        for t in range(h.shape[1]):
            before = h[:, t - 1] @ b + extra[:, t - 1] @ mixed if t else 0.0
            h[:, t] = unit(embed[batch["input_ids"][:, t]] @ a + before + offset)
        return torch.cat((h, 3.0 * h, 0.2 * extra), dim=-1)

    drafter = drafter_of(tiny_target, tmp_path, "unrolled-layers", target_layers=[0, 2])
    start_linear(drafter, rows, embed, held_of, 10**6)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    held, anchors = held_of(batch), valid_anchors(batch["segments"], batch["answer"], 1)
    at = anchors.flatten().nonzero()[:, 0]
    h, states = held.flatten(0, 1).split((tiny.HIDDEN, 2 * tiny.HIDDEN), dim=-1)
    tokens = embed[batch["input_ids"].flatten()[at + 1]]
    x, y = torch.cat((tokens, states[at], torch.ones(len(at), 1)), dim=1), h[at + 1]
    best = (x @ torch.linalg.lstsq(x, y, driver="gelsd").solution - y).norm()

    def missed():
        given = batch["input_ids"], held, batch["positions"], batch["segments"], anchors
        with torch.no_grad():
            return (draft(drafter, embed, *given).serial[0] - y).norm()

    assert missed() < 1.25 * best
    with torch.no_grad():
        drafter.combine.weight[:, tiny.HIDDEN :] = 0.0
    assert missed() > 1.5 * best


@pytest.mark.parametrize("name", ["unrolled", "paper", "eagle"])
def test_an_untrained_drafter_drafts_the_linear_map(monkeypatch, world, tmp_path, tiny_target, name):
    monkeypatch.setattr(start, "RIDGE", 1e-9)
    rows, embed, features_of, *_ = world
    drafter = drafter_of(tiny_target, tmp_path, name)
    start_linear(drafter, rows, embed, features_of, 10**6)
    batch = {key: value[None] for key, value in rows[0].items()}
    h = features_of(batch)
    anchors = valid_anchors(batch["segments"], batch["answer"], 1)
    with torch.no_grad():
        out = draft(drafter, embed, batch["input_ids"], h, batch["positions"], batch["segments"], anchors)
    wanted = h[:, 1:][anchors[:, :-1]]
    if name == "eagle":
        # Without a bias the map is missed by the offset's part that inputs cannot make up for.
        assert (out.serial[0] - wanted).norm() < 0.5 * wanted.norm()
    else:
        # Layers near zero are not zero: their random part is 3 % of it.
        assert (out.serial[0] - wanted).norm() < 0.1 * wanted.norm()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = random.Random(0)
    file = tmp_path_factory.mktemp("data") / "answers.jsonl"
    lines = [
        {"id": f"s{i}", "prompt": [rng.randrange(2, 150) for _ in range(5)], "answer": [7 + i + j for j in range(20)]}
        for i in range(40)
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


@pytest.mark.parametrize(("optimizer", "name"), [("adamw", "eagle"), ("muon", "unrolled")])
def test_fc_learns_at_its_own_rate_after_a_linear_start(tmp_path, tiny_target, data, optimizer, name):
    def moved(folder, **changes):
        """How far fc and a layer's matrix go in the second step of two."""
        settings = recipe(tiny_target, data, tmp_path / folder, optimizer=optimizer, recipe=name, steps=2, save_every=1,
                          schedule="stable", warmup_ratio=0.0, **changes)  # fmt: skip
        train(settings)
        first, last = (
            load_file(tmp_path / folder / place / "model.safetensors") for place in ("checkpoint-1/drafter", "final")
        )
        return [float((last[n] - first[n]).norm()) for n in ("fc.weight", "layers.0.mlp.up_proj.weight")]

    fitted, whole, kept = moved("fitted"), moved("whole", fc_rate=1.0), moved("kept", fc_rate=0.0)
    assert fitted[0] / fitted[1] == pytest.approx(FITTED_RATE * whole[0] / whole[1], rel=0.5)
    assert kept[0] == 0.0 < kept[1]


def test_slow_parameters_are_in_groups_of_their_own():
    layer = torch.nn.Linear(4, 4)
    other = torch.nn.Linear(4, 4)
    params = [*layer.parameters(), *other.parameters()]
    muon = MuonWithAdamW(params, 1.0, (), layer.parameters(), 0.25)
    adamw = torch.optim.AdamW(params, lr=1.0)
    apart(adamw, layer.parameters(), 0.25)
    for optimizer in (muon, adamw):
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates == {id(p): 0.25 if p in set(layer.parameters()) else 1.0 for p in params}
