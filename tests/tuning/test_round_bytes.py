"""Bytes of a draft round by draft_weights, and what plan makes of them."""

from __future__ import annotations

import json

import pytest
import tiny
from layouts import LAYER
from typer.testing import CliRunner

from vllm_gumiho.cli import app
from vllm_gumiho.drafters.checkpoints import save_speculators
from vllm_gumiho.drafters.gumiho.layout import GumihoSizes
from vllm_gumiho.drafters.gumiho.round_bytes import round_bytes
from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.request.round_bytes import of_checkpoint
from vllm_gumiho.tuning.theory import StepTimes

LLAMA3_8B = GumihoSizes(4096, 14336, 4096, 1024, 2, 2, 5, True, 128_256)


@pytest.mark.parametrize(("weights", "vocabulary", "gigabytes"), [
    ("bf16", 128_256, 6.27), ("fp8", 128_256, 3.24), ("int8", 128_256, 3.24), ("bf16", 32_000, 3.91),
    ("fp8", 32_000, 2.06),
])  # fmt: skip
def test_a_round_at_llama_3_8bs_size(weights, vocabulary, gigabytes):
    """fc 201 MB, layers 1,745, heads 1,174, LM head 3 x 1,051."""
    found = round_bytes(LLAMA3_8B, vocabulary, weights)
    assert found.total / 1e9 == pytest.approx(gigabytes, abs=0.005)
    assert found.total == 2 * found.serial + found.heads


def test_times_are_scaled_by_bytes():
    assert StepTimes(10, 0.1, 2, 4).at(0.5, 0.25) == StepTimes(10, 0.1, 1, 1)


def test_plan_says_each_setting(tmp_path):
    save_speculators(tmp_path / "head", tiny.drafter_tensors(), "target", LAYER)
    given = ["plan", "--step-times", "10,0.1,3,3", "--acceptance", ".8,.7,.6", "--weights-of", str(tmp_path / "head")]
    plain = CliRunner().invoke(app, given, catch_exceptions=False)
    assert plain.exit_code == 0
    assert "MB a round" in plain.stdout
    found = json.loads(CliRunner().invoke(app, [*given, "--json"], catch_exceptions=False).stdout)
    rows = found["draft_weights"]
    assert list(rows) == ["bf16", "fp8", "int8"]
    assert rows["bf16"]["tokens_per_s"] == pytest.approx(found["best"]["tokens_per_s"])
    assert rows["int8"]["tokens_per_s"] > 1.05 * rows["bf16"]["tokens_per_s"]
    assert rows["int8"]["megabytes"] < 0.6 * rows["bf16"]["megabytes"]


def test_a_checkpoint_that_does_not_tell_its_vocabulary_is_named(tmp_path):
    where = tiny.write_released(
        tmp_path, {k: v for k, v in tiny.drafter_tensors().items() if k != "embed_tokens.weight"}
    )
    with pytest.raises(CheckpointError, match="convert it with --target"):
        of_checkpoint(str(where))
