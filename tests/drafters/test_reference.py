"""What the engine drafts is what the paper's equations draft, step by step, on a real prompt."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from engines import environment
from places import PROCESSES
from reference_drafter import ReferenceDrafter
from safetensors.torch import load_file

from vllm_gumiho.checkpoint.tensors import D2T
from vllm_gumiho.drafters.checkpoints import open_checkpoint
from vllm_gumiho.drafters.gumiho.trainable import GumihoDrafter
from vllm_gumiho.drafters.trainable_layers import DrafterConfig
from vllm_gumiho.request.catalogue import find_checkpoint
from vllm_gumiho.training.unrolling import draft

pytestmark = pytest.mark.engine
PROMPT = "List five things to check before renting a flat."


@dataclass
class SomeDrafted(ReferenceDrafter):
    """The equations, tokens that may not be drafted without a chance.  allowed bool ``[V]``."""

    allowed: torch.Tensor | None = None

    def product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        found = super().product(x, name)
        return found.masked_fill(~self.allowed, -torch.inf) if name == "lm_head" else found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, embedded_target):
    out = tmp_path_factory.mktemp("drafts") / "records.pt"
    checkpoint = find_checkpoint(str(embedded_target))
    script = PROCESSES / "drafts_main.py"
    done = subprocess.run(
        [sys.executable, str(script), str(embedded_target), checkpoint, PROMPT, str(out)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    embed = load_file(embedded_target / "model.safetensors")["model.embed_tokens.weight"].float()
    weights = dict(open_checkpoint(checkpoint).tensors())
    d2t = weights.pop(D2T, torch.zeros(len(embed), dtype=torch.long))
    weights = {name: tensor.float() for name, tensor in weights.items()}
    allowed = torch.zeros(len(embed), dtype=torch.bool)
    allowed[torch.arange(len(d2t)) + d2t] = True
    reference = SomeDrafted(
        weights=weights,
        embed=embed,
        lm_head=embed,
        allowed=allowed,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=100000.0,
        eps=1e-5,
    )
    return torch.load(out, weights_only=True), reference


def test_draft_tokens_and_features_equal_the_equations(recorded):
    records, reference = recorded
    accepted = 0
    assert len(records) >= 5
    for step, record in enumerate(records):
        tokens = torch.tensor(record["tokens"])
        drafted, features = reference.draft(tokens, record["features"])
        # float32 on both sides; sums of 576 to 1536 terms in another order differ by about 1e-5 of their size.
        torch.testing.assert_close(record["draft_features"], torch.stack(features), rtol=1e-3, atol=1e-3)
        assert record["drafted"] == drafted, f"drafting step {step}"
        if step + 1 < len(records):
            accepted += len(records[step + 1]["tokens"]) - len(record["tokens"]) - 1
    assert accepted > 0, "no draft was ever accepted, so later positions were never reached"


def _drafter(reference) -> GumihoDrafter:
    config = DrafterConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        vocab_size=49152,
    )
    drafter = GumihoDrafter(config)
    drafter.load_state_dict(reference.weights)
    return drafter


def test_the_unrolled_training_pass_computes_what_the_engine_drafts(recorded):
    """Where a draft was right, training fed the same tokens, so its features must be the engine's."""
    records, reference = recorded
    drafter = _drafter(reference)
    for record in records[:4]:
        # Training is given true next tokens; giving it the drafted ones makes it continue as drafting did.
        ids = torch.tensor([record["tokens"] + record["drafted"]])
        length = ids.shape[1]
        features = torch.zeros(1, length, 576)
        features[0, : len(record["features"])] = record["features"]
        anchors = torch.zeros(1, length, dtype=torch.bool)
        anchors[0, len(record["features"]) - 1] = True
        with torch.no_grad():
            out = draft(
                drafter,
                reference.embed,
                ids,
                features,
                torch.arange(length)[None],
                torch.ones(1, length, dtype=torch.long),
                anchors,
            )
        computed = torch.cat((*out.serial, out.heads[:, 0]))
        torch.testing.assert_close(record["draft_features"], computed, rtol=1e-3, atol=1e-3)


def test_one_training_pass_computes_every_draft_of_the_text(recorded):
    """All drafting steps are anchors of one row, each going on from the drafter's own tokens, right or wrong."""
    records, reference = recorded
    ids = torch.tensor([records[-1]["tokens"]])
    length = ids.shape[1]
    features, anchors = torch.zeros(1, length, 576), torch.zeros(1, length, dtype=torch.bool)
    features[0, :-1] = records[-1]["features"]
    for record in records:
        count = len(record["features"])
        assert record["tokens"] == ids[0, : count + 1].tolist()
        # The engine's target pass over the same tokens, in other batches of tokens.
        torch.testing.assert_close(record["features"], features[0, :count], rtol=1e-3, atol=1e-3)
        anchors[0, count - 1] = True
    assert int(anchors.sum()) == len(records) >= 5

    def own_token(draft_features, true):
        return reference.product(draft_features, "lm_head").argmax(-1)

    with torch.no_grad():
        out = draft(
            _drafter(reference),
            reference.embed,
            ids,
            features,
            torch.arange(length)[None],
            torch.ones(1, length, dtype=torch.long),
            anchors,
            own_token=own_token,
        )
    computed = torch.stack((*out.serial, *out.heads), dim=1)
    torch.testing.assert_close(
        torch.stack([record["draft_features"] for record in records]), computed, rtol=1e-3, atol=1e-3
    )
    tokens = own_token(computed.flatten(0, 1), None).view(len(records), -1)
    assert tokens.tolist() == [record["drafted"] for record in records]
    # Had every draft been right, the true tokens would have done as well.
    wrong = [record["drafted"][0] != ids[0, len(record["tokens"])] for record in records[:-1]]
    assert any(wrong)
