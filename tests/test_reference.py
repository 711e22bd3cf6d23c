"""What the engine drafts is what the paper's equations draft, step by step, on a real prompt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference_drafter import ReferenceDrafter
from safetensors.torch import load_file

from vllm_gumiho.catalogue import find_checkpoint
from vllm_gumiho.checkpoint import open_checkpoint
from vllm_gumiho.training.drafter import DrafterConfig, GumihoDrafter
from vllm_gumiho.training.unrolling import draft

pytestmark = pytest.mark.engine
PROMPT = "List five things to check before renting a flat."


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, embedded_target):
    out = tmp_path_factory.mktemp("drafts") / "records.pt"
    checkpoint = find_checkpoint(str(embedded_target))
    script = Path(__file__).with_name("drafts_main.py")
    done = subprocess.run(
        [sys.executable, str(script), str(embedded_target), checkpoint, PROMPT, str(out)],
        capture_output=True, text=True, timeout=600, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    embed = load_file(embedded_target / "model.safetensors")["model.embed_tokens.weight"].float()
    reference = ReferenceDrafter(
        weights=dict(open_checkpoint(checkpoint).tensors()), embed=embed, lm_head=embed, num_heads=9, num_kv_heads=3,
        head_dim=64, rope_theta=100000.0, eps=1e-5,
    )  # fmt: skip
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


def test_the_unrolled_training_pass_computes_what_the_engine_drafts(recorded):
    """Where a draft was right, training fed the same tokens, so its features must be the engine's."""
    records, reference = recorded
    config = DrafterConfig(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        rope_theta=100000.0, rms_norm_eps=1e-5, vocab_size=49152,
    )  # fmt: skip
    drafter = GumihoDrafter(config)
    drafter.load_state_dict(reference.weights)
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
                drafter, reference.embed, ids, features, torch.arange(length)[None],
                torch.ones(1, length, dtype=torch.long), anchors,
            )  # fmt: skip
        computed = torch.cat((*out.serial, out.heads[:, 0]))
        torch.testing.assert_close(record["draft_features"], computed, rtol=1e-3, atol=1e-3)
