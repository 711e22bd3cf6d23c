"""Every kind of target: trained for two steps, its head served at K = 7, 3 and 1, texts and drafts held to the target.

The features are held to those that training takes.  A few kinds run in ``make test``, all in ``make test-long``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zoo
from engines import case, run, step, tokens
from runs import recipe
from safetensors.torch import load_file

pytestmark = pytest.mark.engine
# By batch size: K = 7 for one request, 3 for two, 1 for three.
SCHEDULE = [[1, 1, 7], [2, 2, 3], [3, 64, 1]]
# One of them is longer than every window.
PROMPTS = [[3 + (i * 7 + j * 5) % 150 for j in range(zoo.WINDOW + 8 - 15 * i)] for i in range(3)]
STEPS = ("7", "3", "1")
QUICK = ("gemma2", "gpt2")
IN_V2 = ("mistral", "gemma2", "gemma3 in turn", "phi", "gpt2")
# Of a soft cap, a scale, a bias of logits: their drafts are drawn, too.
DRAWN = ("gemma2", "granite", "phi")
UNSERVED = {"qwen2_vl"}
REST = [name for name in zoo.ZOO if name not in QUICK and name not in UNSERVED]
# Kinds of one engine process each.
GROUPS = {
    ("v1", name): group
    for group in (QUICK, *(tuple(REST[i : i + 5]) for i in range(0, len(REST), 5)))
    for name in group
} | {("v2", name): (name,) for name in IN_V2}
CASES = [
    pytest.param(key, id=" ".join(key), marks=() if key[0] == "v1" and key[1] in QUICK else pytest.mark.long)
    for key in GROUPS
]
_done: dict = {}


def trained(folder: Path, name: str) -> tuple[Path, Path]:
    """A target and its head after two steps."""
    from vllm_gumiho.training.trainer import train

    target = zoo.write(folder / "target", zoo.ZOO[name])
    draws = torch.Generator().manual_seed(3)
    lines = []
    for i in range(8):
        ids = torch.randint(2, 200, (60,), generator=draws).tolist()
        lines.append(json.dumps({"id": str(i), "prompt": ids[:20], "answer": ids[20:]}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    metrics = train(recipe(target, folder / "data.jsonl", folder / "run", steps=2, save_every=2, rows=1))
    assert metrics["eval_acceptance_length"] >= 1.0
    return target, folder / "run" / "final"


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """Of a group of kinds, whose engines share a process; of those alone that this run asks for."""
    asked = {tuple(item.callspec.id.split(" ", 1)) for item in request.session.items if hasattr(item, "callspec")}

    def of(key: tuple[str, str]) -> tuple[dict, dict]:
        runner, name = key
        group = tuple(one for one in GROUPS[key] if (runner, one) in asked) or (name,)
        if (runner, group) not in _done:
            cases, pairs = {}, {}
            sampling = {"temperature": 0.0, "max_tokens": 12 if runner == "v1" else 8, "ignore_eos": True}
            calls = [{"prompts": PROMPTS[:count], "sampling": sampling} for count in (1, 2, 3)]
            for name in group:
                target, head = pairs[name] = trained(tmp_path_factory.mktemp("kind"), name)
                drafting = {"method": "gumiho", "model": str(head), "num_speculative_tokens_per_batch_size": SCHEDULE}
                for on, speculative in (("off", None), ("on", drafting)):
                    cases[f"{name} {on}"] = case(target, speculative, calls) | {"keep features": True}
                if name in DRAWN:
                    hot = [{"prompts": PROMPTS, "sampling": sampling | {"temperature": 1.0, "max_tokens": 20}}]
                    drawing = {"method": "gumiho", "model": str(head), "draft_sample_method": "probabilistic"}
                    cases[f"{name} drawn"] = case(target, drawing, hot) | {"keep features": True}
            _done[runner, group] = run(tmp_path_factory.mktemp("engines"), cases, runner), pairs
        return _done[runner, group]

    return of


@pytest.mark.parametrize("key", CASES)
def test_a_kind_of_target_is_trained_for_and_served(results, key, record_property):
    runner, name = key
    found, pairs = results(key)
    target, head = pairs[name]
    for asked in ("0", "1", "2"):
        on, off = step(found, f"{name} on", asked), step(found, f"{name} off", asked)
        assert tokens(on) == tokens(off), f"batch of {int(asked) + 1}"
        assert off["counts"]["drafts"] == 0
        assert on["counts"]["drafted"] > 0
    facts = found[f"{name} on"]["facts"]
    assert facts["runner"] == runner
    # `run` holds draft tokens to the equations on the engine's features; here these are held to training's.
    assert facts["drafts"]["compared"] > 50
    assert_features_are_those_of_training(zoo.ZOO[name], target, facts["features"])
    assert_the_head_is_whole(head)
    for what in ("trained", runner.upper()):
        record_property("target", [name, what])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in DRAWN]
)
def test_drafts_are_drawn_by_the_targets_own_bias_scale_and_soft_cap(results, name):
    """`run` holds each distribution that drafts are drawn from to the equations and what follows the LM head."""
    found, _ = results(("v1", name))
    assert step(found, f"{name} drawn", "0")["counts"]["drafted"] > 0
    assert found[f"{name} drawn"]["facts"]["drafts"]["compared"] > 50


def assert_features_are_those_of_training(kind: zoo.Kind, target: Path, features: list) -> None:
    from vllm_gumiho.training.target import open_target

    frozen, lengths = open_target(str(target)), []
    for text, given in features:
        length = len(given) if not kind.wider else min(len(given), kind.window)
        (wanted,) = frozen.compute_sequences([torch.tensor(text[:length])])
        torch.testing.assert_close(torch.tensor(given[:length]), wanted, rtol=1e-4, atol=1e-4)
        lengths.append(length)
    assert max(lengths) > kind.window or kind.wider


def assert_the_head_is_whole(head: Path) -> None:
    """What was written is what is read, and what two steps have moved."""
    from vllm_gumiho.drafters.checkpoints import open_checkpoint

    read, written = dict(open_checkpoint(head).tensors()), load_file(head / "model.safetensors")
    assert read.keys() == written.keys()
    assert all(torch.equal(read[key], written[key]) for key in read)
    assert all(tensor.isfinite().all() for tensor in read.values())
