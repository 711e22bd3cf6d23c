"""What holds engines' drafts to the equations: itself held to the plain reference, and to find what is wrong."""

from __future__ import annotations

import pytest
import tiny
import tiny_moa
import torch
from draft_check import Draft, Record, check
from many_gumiho import plain_target, reference_of
from many_moa import moa_reference_of

from vllm_gumiho.drafters.draft_weights import DraftWeights

LENGTHS = (4, 9, 21)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    target = tiny.write_target(folder / "target")
    return target, tiny.write_released(folder / "checkpoint", tiny.drafter_tensors())


@pytest.fixture(scope="module")
def drafted(models):
    """A text with drafts after some of its tokens, by the plain reference: one draft at a time, in loops."""
    target, checkpoint = models
    reference = reference_of(target, checkpoint)
    torch.manual_seed(3)
    text = torch.randint(2, tiny.VOCAB, (30,))
    with torch.no_grad():
        features = plain_target(target).model(text[None]).last_hidden_state[0]
    drafts = [reference.draft(text[:length], features[: length - 1]) for length in LENGTHS]
    return reference, text, features, drafts


def test_many_drafts_in_one_pass_are_those_of_the_plain_reference(drafted):
    reference, text, features, drafts = drafted
    tokens = torch.tensor([tokens for tokens, _ in drafts])
    logits = reference.logits(text, features[:-1], torch.tensor(LENGTHS), tokens)
    wanted = torch.stack([torch.stack(found) @ reference.lm_head.T for _, found in drafts])
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def checked(models, drafted, tokens: list[list[int]], **more) -> dict:
    _, text, _, _ = drafted
    drafts = [Draft("a", length, each, **more) for length, each in zip(LENGTHS, tokens, strict=True)]
    record = Record(drafts=drafts, texts={"a": text.tolist()})
    return check(record, *models, longest=24, exact=True, engines_features=False)


def test_right_drafts_are_found_right_up_to_the_longest_text(models, drafted):
    found = checked(models, drafted, [tokens for tokens, _ in drafted[3]])
    assert found["wrong"] == []
    assert found["compared"] == 7 + 7 + (24 - 21)


@pytest.mark.parametrize("position", range(7))
def test_a_wrong_token_is_found_at_each_position(models, drafted, position):
    tokens = [list(tokens) for tokens, _ in drafted[3]]
    tokens[1][position] = (tokens[1][position] + 1) % tiny.VOCAB
    (first, *_) = checked(models, drafted, tokens)["wrong"]
    assert f"after 9 tokens: draft token {position} is" in first


def test_a_draft_of_another_text_is_found(models, drafted):
    first, second, third = [tokens for tokens, _ in drafted[3]]
    assert any("after 4 tokens" in wrong for wrong in checked(models, drafted, [second, first, third])["wrong"])


def test_a_wrong_distribution_is_found(models, drafted):
    tokens = [tokens for tokens, _ in drafted[3]]
    even = torch.full((7, tiny.VOCAB), 1 / tiny.VOCAB)
    assert "distribution 0" in checked(models, drafted, tokens, spread=even, temperature=1.0)["wrong"][0]


def test_wrong_confidences_are_found(models, drafted):
    tokens = [tokens for tokens, _ in drafted[3]]
    confidence = torch.full((7,), 0.5), 0.5, torch.zeros(7)
    assert "confidence 0" in checked(models, drafted, tokens, confidence=confidence)["wrong"][0]


ROUNDED = {"weights": DraftWeights("int8", "int8"), "rounded": frozenset({"linear", "heads", "lm_head"})}


@pytest.fixture(scope="module")
def rounded(models, drafted):
    """Drafts of int8 products after most tokens of the text, and their logits: ``[D]``, ``[D, 7]``, ``[D, 7, V]``."""
    _, text, features, _ = drafted
    reference, lengths = reference_of(*models, **ROUNDED), torch.arange(2, 30)
    # Features as another order of float32's sums would make them.
    features = features * (1 + 1e-6 * torch.randn(features.shape, generator=torch.Generator().manual_seed(9)))
    with torch.no_grad():
        tokens = [reference.draft(text[:length], features[: length - 1])[0] for length in lengths]
        logits = reference.logits(text, features[:-1], lengths, torch.tensor(tokens))
    return lengths, torch.tensor(tokens), logits


def checked_rounded(models, drafted, lengths, tokens, spreads=None) -> dict:
    """spreads ``[D, 7, V]``: what the tokens were drawn from, at a temperature of 1."""
    more = [{} if spreads is None else {"spread": spreads[i], "temperature": 1.0} for i in range(len(lengths))]
    drafts = [Draft("a", n, each, **m) for n, each, m in zip(lengths.tolist(), tokens.tolist(), more, strict=True)]
    record = Record(drafts=drafts, texts={"a": drafted[1].tolist()})
    return check(record, *models, longest=99, exact=True, engines_features=False, **ROUNDED)


def test_rounded_drafts_are_found_right(models, drafted, rounded):
    lengths, tokens, _ = rounded
    found = checked_rounded(models, drafted, lengths, tokens)
    assert found["wrong"] == []
    assert found["compared"] == tokens.numel()


def test_more_rounded_tokens_than_chance_moves_are_found(models, drafted, rounded):
    """Each nearly as likely as the likeliest one, so that none is wrong by itself."""
    lengths, tokens, logits = rounded
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    close = (first - second).flatten().argsort()[:40]
    tokens = tokens.clone()
    tokens.view(-1)[close] = logits.topk(2, dim=-1).indices[..., 1].flatten()[close]
    (one, *_) = checked_rounded(models, drafted, lengths, tokens)["wrong"]
    assert "tokens are not the likeliest; rounding moves" in one


def test_one_wrong_rounded_token_is_found(models, drafted, rounded):
    lengths, tokens, logits = rounded
    tokens = tokens.clone()
    tokens[9, 4] = logits[9, 4].argmin()
    (one,) = checked_rounded(models, drafted, lengths, tokens)["wrong"]
    assert f"after {lengths[9]} tokens: draft token 4 is" in one


def test_drawn_rounded_tokens_need_not_be_the_likeliest(models, drafted, rounded):
    lengths, _, logits = rounded
    spreads = logits.softmax(-1)
    drawn = torch.multinomial(spreads[:, 0], 1)  # serial tokens but the first are of what was drafted before
    assert (drawn[:, 0] != logits[:, 0].argmax(-1)).sum() > 10
    assert checked_rounded(models, drafted, lengths, drawn, spreads[:, :1])["wrong"] == []


@pytest.mark.parametrize("layers", [tiny_moa.LAYERS, ()])
def test_many_moa_drafts_in_one_pass_are_those_of_the_plain_reference(tmp_path, layers):
    target = tiny.write_target(tmp_path / "target", num_hidden_layers=tiny_moa.TARGET_LAYERS)
    if layers:
        checkpoint = tiny_moa.write(tmp_path / "moa", str(target))
        held_by: tiny_moa.TargetStates | tiny_moa.TargetCache = tiny_moa.TargetStates(target)
    else:
        checkpoint, held_by = tiny_moa.write_published(tmp_path / "moa", target), tiny_moa.TargetCache(target)
    plain = tiny_moa.reference(target, checkpoint, layers=layers)
    text = [5 + i * 11 % 140 for i in range(14)]
    lengths, held = (3, 8, 14), held_by.states(text[:-1])
    drafts = [plain.draft(torch.tensor(text[:n]), held[: n - 1], 4) for n in lengths]
    many = moa_reference_of(target, checkpoint)
    torch.testing.assert_close(many.read(plain_target(target), torch.tensor(text[:-1])), held)
    logits = many.logits(
        torch.tensor(text), held, torch.tensor(lengths), torch.tensor([tokens for tokens, _ in drafts])
    )
    wanted = torch.stack([hidden @ plain.lm_head.T for _, hidden in drafts])
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    record = Record(drafts=[Draft("a", n, tokens) for n, (tokens, _) in zip(lengths, drafts, strict=True)])
    record.texts["a"] = text
    assert check(record, target, checkpoint, 99, exact=True, engines_features=False)["wrong"] == []
    record.drafts[1].tokens[2] = (record.drafts[1].tokens[2] + 1) % tiny.VOCAB
    (wrong, *_) = check(record, target, checkpoint, 99, exact=True, engines_features=False)["wrong"]
    assert "after 8 tokens: draft token 2 is" in wrong


def test_many_drafts_from_layers_are_those_of_the_plain_reference(tmp_path):
    target = tiny.write_target(tmp_path / "target", num_hidden_layers=tiny.TARGET_LAYERS)
    checkpoint = tiny.write_released(tmp_path / "layered", tiny.layered_tensors())
    reference, text = reference_of(target, checkpoint), torch.tensor([5 + i * 11 % 140 for i in range(22)])
    held = tiny_moa.TargetStates(target, tiny.LAYERS).states(text[:-1].tolist())
    torch.testing.assert_close(reference.read(plain_target(target), text[:-1]), held)
    drafts = [reference.draft(text[:n], reference.first_features(held[: n - 1])) for n in LENGTHS]
    tokens = torch.tensor([tokens for tokens, _ in drafts])
    wanted = torch.stack([torch.stack(found) @ reference.lm_head.T for _, found in drafts])
    for given in (held, held.flatten(1)):
        logits = reference.logits(text, given, torch.tensor(LENGTHS), tokens)
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    # A state that is another token's, or another layer's, makes other drafts.
    for wrong in (held.roll(1, 0), held.roll(1, 1)):
        other = reference.logits(text, wrong, torch.tensor(LENGTHS), tokens)
        assert (other.argmax(-1) != tokens).any(1).all()
