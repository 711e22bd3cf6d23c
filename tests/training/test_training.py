"""The trainer learns, resumes exactly, and exports what the engine reads."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from runs import recipe, unrolled

from vllm_gumiho.drafters.checkpoints import open_checkpoint
from vllm_gumiho.drafters.gumiho.trainable import GumihoDrafter
from vllm_gumiho.errors import DataError
from vllm_gumiho.training.candidates import Candidates
from vllm_gumiho.training.data import PackedRows, Sample, read_samples
from vllm_gumiho.training.objective import losses
from vllm_gumiho.training.optimizer import MuonWithAdamW
from vllm_gumiho.training.provenance import made_with, read_recipe
from vllm_gumiho.training.recipes import objective_of
from vllm_gumiho.training.target_head import LmHead
from vllm_gumiho.training.trainer import train
from vllm_gumiho.training.unrolling import draft, valid_anchors


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Answers that count upwards, so that a drafter can learn them."""
    rng = random.Random(0)
    lines = []
    for i in range(40):
        start = rng.randrange(2, 100)
        answer = [start + j for j in range(rng.randrange(8, 20))]
        lines.append(json.dumps({"id": f"s{i}", "prompt": [rng.randrange(2, 150) for _ in range(5)], "answer": answer}))
    file = tmp_path_factory.mktemp("data") / "answers.jsonl"
    file.write_text("\n".join(lines))
    return file


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "muon-serial"])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, tiny_target, data, optimizer):
    whole = tmp_path / "whole"
    train(recipe(tiny_target, data, whole, recipe="unrolled", optimizer=optimizer))
    (tmp_path / "part").mkdir()
    shutil.copytree(whole / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    train(recipe(tiny_target, data, tmp_path / "part", recipe="unrolled", optimizer=optimizer), resume=True)
    expected = dict(open_checkpoint(whole / "final").tensors())
    resumed = dict(open_checkpoint(tmp_path / "part" / "final").tensors())
    half = dict(open_checkpoint(whole / "checkpoint-2" / "drafter").tensors())
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert any(not torch.equal(expected[name], half[name]) for name in expected)
    if optimizer != "adamw":
        states = torch.load(whole / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"].values()
        matrices = {name for name, tensor in expected.items() if tensor.ndim == 2}
        heads = {name for name in expected if name.startswith("mlp.")}
        in_muon = matrices - heads if optimizer == "muon-serial" else matrices
        counts = [sum(key in state for state in states) for key in ("momentum_buffer", "exp_avg")]
        assert counts == [len(in_muon), len(expected) - len(in_muon)]


@pytest.mark.parametrize(("plain", "in_muon"), [((), ("fc", "layers", "mlp")), (("mlp",), ("fc", "layers"))])
def test_muon_takes_the_matrices_it_is_given(plain, in_muon):
    drafter = GumihoDrafter(tiny.drafter_config())
    apart = [p for name in plain for p in getattr(drafter, name).parameters()]
    muon, adamw = MuonWithAdamW(drafter.parameters(), 1e-3, apart).parts
    ids = [{id(p) for group in part.param_groups for p in group["params"]} for part in (muon, adamw)]
    for name, p in drafter.named_parameters():
        assert (id(p) in ids[0]) == (p.ndim == 2 and name.partition(".")[0] in in_muon), name
        assert (id(p) in ids[0]) != (id(p) in ids[1]), name


@pytest.mark.parametrize(("phase", "learns"), [("serial", ("fc", "layers")), ("heads", ("mlp",))])
def test_a_phase_trains_its_part_alone(tmp_path, tiny_target, data, phase, learns):
    settings = recipe(tiny_target, data, tmp_path, phase=phase, steps=2, save_every=1, optimizer="muon-serial")
    train(settings)
    first, last = (dict(open_checkpoint(tmp_path / f"checkpoint-{n}" / "drafter").tensors()) for n in (1, 2))
    for name in last:
        assert (not torch.equal(first[name], last[name])) == (name.partition(".")[0] in learns), name
    # The others must be frozen, not merely without gradient: a distributed run waits for every one that is not.
    groups = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)["param_groups"]
    count = sum(len(group["params"]) for group in groups)
    assert count == sum(name.partition(".")[0] in learns for name in last)


def test_short_answers_give_every_parameter_a_gradient(tiny_target):
    """Else a process of a distributed run would wait for gradients that another never has."""
    table = torch.randn(tiny.VOCAB, tiny.HIDDEN)
    drafter = GumihoDrafter(tiny.drafter_config())
    drafter.init_weights(1.0, 1.0)
    row = PackedRows([sample("a", [3, 4, 5], [7, 8])], 16)[0]
    batch = {k: v[None] for k, v in row.items()}
    features = table[batch["input_ids"]]
    losses(drafter, unrolled(candidates=0), table, LmHead(table), batch, features, torch.arange(4))[0].backward()
    assert [name for name, p in drafter.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["paper", "unrolled"])
def test_training_lowers_the_loss_and_exports_a_whole_drafter(tmp_path, tiny_target, data, name):
    settings = recipe(tiny_target, data, tmp_path, recipe=name, steps=30, save_every=30, learning_rate=3e-3)
    metrics = train(settings)
    state = json.loads((tmp_path / "checkpoint-30" / "trainer_state.json").read_text())
    logged = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert logged
    assert all(value == value and value > 0 for value in logged)
    assert metrics["eval_acceptance_length"] >= 1.0
    written = open_checkpoint(tmp_path / "final")
    assert written.sizes.max_draft_tokens == 7
    assert read_recipe(tmp_path / "final" / "recipe.json") == (settings, made_with(settings, processes=1))


def test_one_batch_can_be_learned(tiny_target, data):
    from transformers import AutoModelForCausalLM

    from vllm_gumiho.training.target import FrozenTarget

    torch.manual_seed(0)
    target = FrozenTarget(AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32))
    # A sharp target, so that the loss is not all entropy.
    target.lm_head = LmHead(target.lm_head.weight * 10)
    batch = {k: v[None] for k, v in PackedRows(read_samples([data], tiny.VOCAB), 64)[0].items()}
    features = target.features(batch)
    drafter = GumihoDrafter(tiny.drafter_config())
    drafter.init_weights(1.0, 1.0)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-3)
    objective, seen = unrolled(candidates=0), []
    for _ in range(40):
        loss, _ = losses(drafter, objective, target.embed, target.lm_head, batch, features, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.6 * seen[0]


def sample(name, prompt, answer) -> Sample:
    return Sample(name, ((list(prompt), list(answer)),))


def test_packed_sequences_do_not_see_each_other(tiny_target):
    """Draft features of a sequence are the same alone and behind another one in a row."""
    torch.manual_seed(0)
    drafter = GumihoDrafter(tiny.drafter_config())
    drafter.init_weights(1.0, 1.0)
    embed = torch.randn(tiny.VOCAB, tiny.HIDDEN)
    first, second = sample("a", [3, 4, 5], range(10, 20)), sample("b", [7, 8], range(30, 42))

    def features_of(samples, row_length):
        (row,) = [PackedRows(samples, row_length)[0]]
        batch = {k: v[None] for k, v in row.items()}
        ids, segments = batch["input_ids"], batch["segments"]
        table = torch.sin(torch.arange(tiny.VOCAB)[:, None] * torch.arange(1, tiny.HIDDEN + 1) * 0.37)
        anchors = valid_anchors(segments, batch["answer"], 7)
        anchors &= segments == segments.max()
        out = draft(drafter, embed, ids, table[ids], batch["positions"], segments, anchors)
        return torch.stack([*out.serial, *out.heads])

    alone, behind = features_of([second], 32), features_of([first, second], 32)
    assert alone.shape[1] > 0
    torch.testing.assert_close(alone, behind, rtol=1e-4, atol=1e-5)


def test_rows_with_unequal_anchors_are_drafted_as_each_alone():
    torch.manual_seed(0)
    drafter = GumihoDrafter(tiny.drafter_config())
    drafter.init_weights(1.0, 1.0)
    embed = torch.randn(tiny.VOCAB, tiny.HIDDEN)
    ids, features = torch.randint(0, tiny.VOCAB, (3, 16)), torch.randn(3, 16, tiny.HIDDEN)
    positions, segments = torch.arange(16).expand(3, 16), torch.ones(3, 16, dtype=torch.long)
    anchors = torch.zeros(3, 16, dtype=torch.bool)
    anchors[0, [1, 4, 9]] = anchors[2, [0, 2, 3, 8, 13]] = True

    def features_of(rows):
        picked = (x[rows] for x in (ids, features, positions, segments, anchors))
        out = draft(drafter, embed, *picked)
        return torch.stack([*out.serial, *out.heads], dim=1)

    together = features_of(slice(0, 3))
    alone = torch.cat([features_of(slice(i, i + 1)) for i in range(3)])
    assert together.shape[0] == 8
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_heads_that_do_not_steer_leave_the_transformer_its_own_gradient(tiny_target, data):
    from transformers import AutoModelForCausalLM

    from vllm_gumiho.training.target import FrozenTarget

    target = FrozenTarget(AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32))
    batch = {k: v[None] for k, v in PackedRows(read_samples([data], tiny.VOCAB), 64)[0].items()}
    features = target.features(batch)
    torch.manual_seed(0)
    drafter = GumihoDrafter(tiny.drafter_config())
    drafter.init_weights(1.0, 1.0)

    def gradients(**changes):
        objective = replace(unrolled(candidates=0), **changes)
        drafter.zero_grad()
        losses(drafter, objective, target.embed, target.lm_head, batch, features, torch.arange(4))[0].backward()
        return drafter.layers[0].mlp.up_proj.weight.grad.clone(), drafter.mlp[0][0].linear.weight.grad

    serial_alone, no_heads = gradients(train_heads=False)
    assert no_heads is None
    apart, heads = gradients(heads_steer=False)
    torch.testing.assert_close(apart, serial_alone)
    assert heads.abs().max() > 0
    assert not torch.allclose(gradients(heads_steer=True)[0], serial_alone)


def test_further_steps_train_the_transformer_on_positions_that_heads_draft(tiny_target, data, tmp_path):
    torch.manual_seed(0)
    served = GumihoDrafter(tiny.drafter_config())
    served.init_weights(1.0, 1.0)
    longer = GumihoDrafter(replace(served.config, num_serial_steps=4, num_heads=0))
    longer.load_state_dict({k: v for k, v in served.state_dict().items() if k in longer.state_dict()})
    table = torch.randn(tiny.VOCAB, tiny.HIDDEN)
    batch = {k: v[None] for k, v in PackedRows(read_samples([data], tiny.VOCAB), 64)[0].items()}
    inputs = (table, batch["input_ids"], table[batch["input_ids"]], batch["positions"], batch["segments"])
    anchors = valid_anchors(batch["segments"], batch["answer"], 1)
    plain, out = draft(served, *inputs, anchors), draft(served, *inputs, anchors, further=2)
    wanted = draft(longer, *inputs, anchors)
    torch.testing.assert_close(torch.stack(out.serial + out.further), torch.stack(wanted.serial))
    torch.testing.assert_close(out.heads, plain.heads)
    torch.testing.assert_close(torch.stack(out.serial), torch.stack(plain.serial))

    def trained(drafter, objective):
        total, parts = losses(drafter, objective, table, LmHead(table), batch, inputs[2], torch.arange(4))
        drafter.zero_grad()
        total.backward()
        return total.detach(), parts, drafter.layers[0].mlp.up_proj.weight.grad.clone()

    objective = objective_of(recipe(tiny_target, data, tmp_path, candidates=0, further_steps=2))
    less, few, _ = trained(served, replace(objective, further_steps=0))
    more, many, gradient = trained(served, objective)
    torch.testing.assert_close(gradient, trained(longer, replace(objective, further_steps=0, head_weights=()))[2])
    assert set(many) - set(few) == {"ce_further_3", "feature_further_3", "ce_further_4", "feature_further_4"}
    decay, weight = unrolled().serial_decay, unrolled().feature_weight
    extra = [decay ** (i - 1) * (many[f"ce_further_{i}"] + weight * many[f"feature_further_{i}"]) for i in (3, 4)]
    torch.testing.assert_close(more, less + sum(extra))
    torch.testing.assert_close({name: many[name] for name in few}, few)


def test_early_positions_weigh_more_unless_told_otherwise(data):
    early = unrolled()
    flat = unrolled(early_weighting=False)
    assert early.serial_decay < 1 > early.chain_floor
    assert list(early.head_weights) == sorted(early.head_weights, reverse=True)
    assert (flat.serial_decay, flat.chain_floor, len(set(flat.head_weights))) == (1.0, 1.0, 1)
    assert sum(flat.head_weights) == pytest.approx(sum(early.head_weights))

    torch.manual_seed(0)
    drafter = GumihoDrafter(tiny.drafter_config())
    drafter.init_weights(1.0, 1.0)
    table = torch.randn(tiny.VOCAB, tiny.HIDDEN)
    batch = {k: v[None] for k, v in PackedRows(read_samples([data], tiny.VOCAB), 64)[0].items()}
    for objective in (early, flat):
        total, parts = losses(
            drafter, objective, table, LmHead(table), batch, table[batch["input_ids"]], torch.arange(4)
        )
        weights = [1.0, objective.serial_decay, *objective.head_weights]
        wanted = sum(
            weight * (objective.ce_weight * parts[f"ce_{i}"] + objective.feature_weight * parts[f"feature_{i}"])
            for i, weight in enumerate(weights, 1)
        )
        torch.testing.assert_close(total, wanted)


def test_the_drawn_vocabulary_estimates_the_whole_normaliser():
    torch.manual_seed(0)
    lm_head, features = torch.randn(500, 16) * 0.3, torch.randn(8, 16)
    exact = (features @ lm_head.T).logsumexp(-1)
    labels, frequent = torch.tensor([4, 9, 4]), torch.arange(40)
    draws = []
    for _ in range(200):
        subset = Candidates.draw(labels, frequent, 500, 60)
        columns, known = subset.column(labels)
        assert known.all()
        assert (subset.tokens(columns) == labels).all()
        draws.append(subset.logits(features, LmHead(lm_head).rows(subset.ids)).exp().sum(-1))
    torch.testing.assert_close(torch.stack(draws).mean(0).log(), exact, rtol=0, atol=0.05)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file"):
        read_samples([tmp_path / "nothing.jsonl"], 160)


@pytest.mark.parametrize("line", ["{", '{"id": 1}', '{"id": 1, "prompt": [1], "answer": [5, 999]}'])
def test_a_line_that_is_no_sample_is_named(tmp_path, line):
    file = tmp_path / "bad.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        read_samples([file], 160)
