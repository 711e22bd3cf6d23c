"""What heads are trained on is the target's own, whatever the target: held to its plain forward pass, unpacked."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

from vllm_gumiho.errors import DataError, TargetError
from vllm_gumiho.training.data import PackedRows, Sample, segment_spans
from vllm_gumiho.training.objective import soft_cross_entropy
from vllm_gumiho.training.target import FrozenTarget
from vllm_gumiho.training.target_head import LmHead, read_head
from vllm_gumiho.training.target_model import load_target, refuse_placeholders

LONG = 4 * zoo.WINDOW


def packed() -> dict[str, torch.Tensor]:
    """Two rows: each a sequence of four windows and more, packed with others of other lengths."""
    draws = torch.Generator().manual_seed(1)

    def sample(number: int, length: int) -> Sample:
        tokens = torch.randint(2, 240, (length,), generator=draws).tolist()
        return Sample(str(number), ((tokens[:3], tokens[3:]),))

    lengths = (LONG + 7, LONG - 5, 40, 30, 9)
    rows = PackedRows([sample(i, length) for i, length in enumerate(lengths)], LONG + 48)
    assert len(rows) == 2
    items = [rows[i] for i in range(len(rows))]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


@pytest.fixture(scope="module", params=zoo.ZOO)
def target(request, tmp_path_factory):
    folder = zoo.write(tmp_path_factory.mktemp("zoo") / "target", zoo.ZOO[request.param])
    return zoo.ZOO[request.param], FrozenTarget(load_target(str(folder)))


def test_features_and_labels_are_the_targets_own_beyond_every_window(target):
    kind, frozen = target
    batch = packed()
    features = frozen.features(batch)
    spans = segment_spans(batch["segments"])
    assert max(stop - start for _, start, stop in spans) > LONG
    for row, start, stop in spans:
        ids = batch["input_ids"][row, start:stop]
        with torch.no_grad():
            last = frozen.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            logits = frozen.model(input_ids=ids[None], use_cache=False).logits[0]
        found = features[row, start:stop]
        torch.testing.assert_close(found, last / kind.divided, rtol=0, atol=1e-4)
        labels = frozen.lm_head.logits(found).softmax(-1)
        torch.testing.assert_close(labels, logits.softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "scale", "cap", "has_bias"),
    [
        ("llama", 1.0, None, False),
        ("granite", 0.25, None, False),
        ("gemma2", 1.0, 5.0, False),
        ("phi", 1.0, None, True),
    ],
)
def test_what_follows_the_lm_head_is_read_from_the_model(name, scale, cap, has_bias):
    head, _ = read_head(zoo.new_model(zoo.ZOO[name]), name)
    assert (head.scale, head.soft_cap, head.bias is not None) == (scale, cap, has_bias)


def test_what_an_lm_head_reads_is_scaled_where_the_model_scales_it():
    assert read_head(zoo.new_model(zoo.ZOO["llama"]), "a")[1]
    assert not read_head(zoo.new_model(zoo.ZOO["minicpm3"]), "a")[1]


class Squared(nn.Module):
    """A causal LM whose logits are squares."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner, self.base_model = model, model.base_model
        self.get_output_embeddings = model.get_output_embeddings

    def forward(self, **inputs):
        out = self.inner(**inputs)
        out.logits = out.logits.square()
        return out


def test_logits_of_another_form_are_refused_by_name():
    with pytest.raises(TargetError, match="target squares: what Squared does with the output of its LM head"):
        read_head(Squared(zoo.new_model(zoo.ZOO["llama"])), "squares")


@pytest.mark.parametrize("drawn", [None, torch.tensor([0.0, 0.3, 0.0, 1.2, 0.0])])
def test_the_cross_entropy_and_its_gradient_are_those_of_the_whole_head(drawn):
    torch.manual_seed(0)
    x = torch.randn(6, 8, requires_grad=True)
    head = LmHead(torch.randn(5, 8), torch.randn(5), 0.5, 1.5)
    wanted, rows, truth = torch.rand(4, 5).softmax(-1), torch.tensor([0, 1, 2, 3, 3, 0]), torch.arange(6) % 5
    ce, likely = soft_cross_entropy(x, head, drawn, wanted, rows, truth)
    (found,) = torch.autograd.grad(ce.sum(), x)
    logits = 1.5 * torch.tanh(0.5 * (x @ head.weight.T + head.bias) / 1.5) + (0.0 if drawn is None else drawn)
    plain = -(wanted[rows] * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(ce, plain)
    torch.testing.assert_close(likely, logits.softmax(-1).gather(1, truth[:, None])[:, 0])
    torch.testing.assert_close(found, torch.autograd.grad(plain.sum(), x)[0])


def test_samples_that_stand_for_images_are_refused():
    config = zoo.config_of(zoo.ZOO["qwen2_vl"])
    text = Sample("a", (([5, 6], [7, 8]),))
    refuse_placeholders([text], config, "vision")
    with pytest.raises(DataError, match="sample b: token 252 stands for an image"):
        refuse_placeholders([text, Sample("b", (([5, 252], [7, 8]),))], config, "vision")


def test_an_encoder_decoder_is_refused_in_one_line(tmp_path):
    from transformers import T5Config

    T5Config(d_model=16, num_layers=1, vocab_size=32).save_pretrained(tmp_path)
    with pytest.raises(TargetError, match=r"transformers cannot run it as a causal LM .*; heads are trained for"):
        load_target(str(tmp_path))
