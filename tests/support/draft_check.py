"""Holds what an engine drafted to the equations: every draft of its requests, given the text verified before it.

The target's features come from transformers' plain pass over the whole text, or, for a target that transformers does
not run as the engine does (quantised, with adapters), from what the engine gave its drafter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from many_moa import ManyMoa, moa_reference_of
from reference_drafter import ReferenceDrafter
from safetensors.torch import load_file
from torch import Tensor

from vllm_gumiho.drafters.draft_weights import DraftWeights
from vllm_gumiho.kernels.eight_bit import dequantise_rows, quantise_rows

AS_GIVEN = DraftWeights()


@dataclass
class Draft:
    """One request's draft of one step.

    length: verified tokens before it, the newest of which no target pass has read.  tokens: the K drafted.
    spread: what they were drawn from where they were not the likeliest, ``[K, V]`` probabilities.
    temperature: of the request.  confidence: what adaptive verification takes for the chance of each token, ``[K]``,
    with the slope and the intercepts ``[K]`` that it was made with.
    """

    request: str
    length: int
    tokens: list[int]
    spread: Tensor | None = None
    temperature: float = 0.0
    confidence: tuple[Tensor, float, Tensor] | None = None


@dataclass
class Record:
    """What an engine drafted.  texts: all tokens of each request; features: the target's, by position, each ``[H]``.

    dropped: drafts of more than `most`, not kept.  wrong: what was seen to be wrong at once.
    """

    most: int = 400
    drafts: list[Draft] = field(default_factory=list)
    texts: dict[str, list[int]] = field(default_factory=dict)
    features: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    dropped: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, draft: Draft) -> None:
        if not draft.tokens:  # K is 0 in this step
            return
        if len(self.drafts) < self.most:
            self.drafts.append(draft)
        else:
            self.dropped += 1

    def finished(self) -> list[tuple[list[int], Draft]]:
        """Drafts of texts that are known so far, each after its verified tokens."""
        return [
            (self.texts[draft.request][: draft.length], draft)
            for draft in self.drafts
            if len(self.texts.get(draft.request, ())) >= draft.length
        ]


@dataclass
class ManyDrafts(ReferenceDrafter):
    """The equations of `ReferenceDrafter` for many drafts of a text in one pass, whatever the number of serial steps.

    allowed ``[V]`` bool: tokens of a draft vocabulary.  bias, scale, soft_cap: of the target's logits.
    """

    num_serial_steps: int = 2
    allowed: Tensor | None = None
    bias: Tensor | float = 0.0
    scale: float = 1.0
    soft_cap: float | None = None

    def read(self, model: Any, tokens: Tensor) -> Tensor:
        """Features of transformers' target on a text, ``[T, H]``."""
        return model.model(tokens[None]).last_hidden_state[0]

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """x ``[N, heads, D]`` at ``positions [N]``: pairs (i, i + D/2) turned by position * theta^(-2i/D)."""
        half = self.head_dim // 2
        frequencies = self.rope_theta ** (-2 * torch.arange(half, dtype=torch.float64) / self.head_dim)
        angles = positions[:, None].double() * frequencies
        cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def masked_layer(self, x: Tensor, index: int, positions: Tensor, seen: Tensor) -> Tensor:
        at = f"layers.{index}."
        y = x if index == 0 else self.norm(x, f"{at}input_layernorm.weight")

        def project(name: str, heads: int) -> Tensor:
            return self.product(y, f"{at}self_attn.{name}.weight").view(len(y), heads, self.head_dim)

        q = self.rotated(project("q_proj", self.num_heads), positions)
        k = self.rotated(project("k_proj", self.num_kv_heads), positions)
        shared = torch.arange(self.num_heads) * self.num_kv_heads // self.num_heads
        scores = torch.einsum("qhd,khd->hqk", q, k[:, shared]) / self.head_dim**0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, project("v_proj", self.num_kv_heads)[:, shared])
        x = x + self.product(mixed.flatten(1), f"{at}self_attn.o_proj.weight")
        y = self.norm(x, f"{at}post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(self.product(y, f"{at}mlp.gate_proj.weight"))
        up = self.product(y, f"{at}mlp.up_proj.weight")
        return x + self.product(gate * up, f"{at}mlp.down_proj.weight")

    def logits(self, tokens: Tensor, features: Tensor, lengths: Tensor, drafted: Tensor) -> Tensor:
        """Draft logits ``[D, K, V]``; arguments as `states` has them."""
        return self.head_logits(self.states(tokens, features, lengths, drafted))

    def head_logits(self, states: Tensor) -> Tensor:
        """``[..., H]`` -> ``[..., V]``, minus infinity for what is never drafted."""
        found = (self.product(states, "lm_head") + self.bias) * self.scale
        if self.soft_cap is not None:
            found = self.soft_cap * torch.tanh(found / self.soft_cap)
        return found if self.allowed is None else found.masked_fill(~self.allowed, -torch.inf)

    def states(self, tokens: Tensor, features: Tensor, lengths: Tensor, drafted: Tensor) -> Tensor:
        """What the LM head drafts from, ``[D, K, H]``, after the first ``lengths [D]`` tokens of a text.

        tokens ``[T + 1]``, features ``[T, H]`` of the target.  drafted ``[D, K]``: serial tokens that later steps go on
        from, so that one difference does not make all behind it differ.
        """
        text = self.fuse(tokens[1:], features)
        count, anchors = len(text), lengths - 2
        nodes, positions = [text], [torch.arange(count)]
        layers = len({name.split(".")[1] for name in self.weights if name.startswith("layers.")})
        hidden, own = [], []
        for step in range(min(self.num_serial_steps, drafted.shape[1])):
            x, where = torch.cat(nodes), torch.cat(positions)
            owner = torch.cat((torch.full((count,), -1), torch.arange(len(anchors)).repeat(step)))
            # A row of the text sees the text up to itself; a drafted one what its draft saw, and that draft's own.
            newest = torch.cat((torch.arange(count), anchors.repeat(step)))
            in_text = (owner == -1)[None] & (where[None] <= newest[:, None])
            seen = in_text | ((owner[None] == owner[:, None]) & (owner != -1)[None] & (where[None] <= where[:, None]))
            for index in range(layers):
                x = self.masked_layer(x, index, where, seen)
            hidden.append(x[anchors] if step == 0 else x[-len(anchors) :])
            own.append(self.fuse(drafted[:, step], hidden[-1]))
            nodes.append(own[-1])
            positions.append(anchors + step + 1)
        count_heads = drafted.shape[1] - self.num_serial_steps
        heads = [self.head(torch.cat(own, dim=-1), index) for index in range(max(0, count_heads))]
        return torch.stack((*hidden, *heads), dim=1)


@dataclass
class ManyLayered(ManyDrafts):
    """Of a drafter whose first serial step reads states of target layers, ``[T, m, H]`` where a feature is taken."""

    layers: tuple[int, ...] = ()

    def read(self, model: Any, tokens: Tensor) -> Tensor:
        from tiny_moa import TargetStates

        return TargetStates(model, self.layers).states(tokens.tolist())

    def states(self, tokens: Tensor, features: Tensor, lengths: Tensor, drafted: Tensor) -> Tensor:
        # An engine gives them side by side.
        states = features.view(len(features), len(self.layers), -1)
        return super().states(tokens, self.first_features(states), lengths, drafted)


# What checkpoints call the embedding and the LM head.
EMBEDDINGS = (
    "model.embed_tokens.weight", "model.language_model.embed_tokens.weight", "model.decoder.embed_tokens.weight",
    "transformer.wte.weight", "gpt_neox.embed_in.weight",
)  # fmt: skip
HEADS = ("lm_head.weight", "embed_out.weight")


def plain_target(folder: Path) -> Any | None:
    """The target as transformers runs it in float32; None where its weights are quantised."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if getattr(AutoConfig.from_pretrained(folder), "quantization_config", None):
        return None
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def reference_of(
    target: Path, checkpoint: Path, weights: DraftWeights = AS_GIVEN, rounded: frozenset[str] = frozenset()
) -> ManyDrafts:
    """The equations with a checkpoint's tensors; layer settings are its config's, else the target's.

    weights: matrices and LM head are what their 8-bit rows stand for.  rounded: see `ReferenceDrafter`.
    """
    from transformers import AutoConfig

    from vllm_gumiho.checkpoint.tensors import D2T, SCALE
    from vllm_gumiho.drafters.checkpoints import open_checkpoint

    opened, config = open_checkpoint(checkpoint), AutoConfig.from_pretrained(target)
    tensors = {name: tensor.float() for name, tensor in opened.tensors() if name != D2T}
    if weights.dtype is not None:
        kept = dict(opened.rows(weights.dtype))
        for name in [name for name, tensor in kept.items() if tensor.dtype == weights.dtype]:
            tensors[name] = kept[name].float() * kept[name + SCALE]
    places = {name: tensor for name, tensor in opened.tensors() if name == D2T}
    text = config.get_text_config()
    layer = text.to_dict() | dict(opened.layer_config)
    rope = layer.get("rope_parameters") or {}
    assert rope.get("rope_type", "default") == "default", f"no reference for {rope}"
    head_dim = layer.get("head_dim") or layer["hidden_size"] // layer["num_attention_heads"]
    own = load_file(target / "model.safetensors")
    embed = next(own[name] for name in EMBEDDINGS if name in own).float()
    head = next((own[name] for name in HEADS if name in own), embed).float()
    size = text.vocab_size
    bias = own["lm_head.bias"].float() if "lm_head.bias" in own else 0.0
    scale = getattr(text, "logit_scale", None) or 1 / (getattr(text, "logits_scaling", None) or 1.0)
    if text.model_type.startswith("minicpm"):  # scales what its LM head reads
        scale = 1.0
    allowed = None
    if D2T in places:
        allowed = torch.zeros(len(embed), dtype=torch.bool)
        allowed[torch.arange(len(places[D2T])) + places[D2T]] = True
    tensors.setdefault("fc.bias", torch.zeros(embed.shape[1]))
    if weights.head_dtype is not None:
        head = dequantise_rows(quantise_rows(head, weights.head_dtype))
    first = next(tensor for name, tensor in tensors.items() if name == "mlp.0.0.linear.weight")
    layers: tuple[int, ...] = opened.sizes.target_layers  # type: ignore[attr-defined]
    kind = partial(ManyLayered, layers=layers) if layers else ManyDrafts
    return kind(
        weights=tensors,
        embed=embed,
        lm_head=head[:size],
        bias=bias,
        scale=scale,
        soft_cap=getattr(text, "final_logit_softcapping", None),
        num_heads=len(tensors["layers.0.self_attn.q_proj.weight"]) // head_dim,
        num_kv_heads=len(tensors["layers.0.self_attn.k_proj.weight"]) // head_dim,
        head_dim=head_dim,
        rope_theta=float(layer.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        eps=layer["rms_norm_eps"],
        num_serial_steps=first.shape[1] // first.shape[0],
        allowed=allowed,
        rounded=rounded,
    )


def _equations(target: Path, checkpoint: Path, weights: DraftWeights, rounded: frozenset[str]) -> ManyDrafts | ManyMoa:
    from vllm_gumiho.drafters.checkpoints import drafter_in
    from vllm_gumiho.drafters.moa import MOA

    if drafter_in(checkpoint) is MOA:
        return moa_reference_of(target, checkpoint)
    return reference_of(target, checkpoint, weights, rounded)


@torch.no_grad()
def check(
    record: Record,
    target: Path,
    checkpoint: Path,
    longest: int,
    exact: bool,
    engines_features: bool,
    weights: DraftWeights = AS_GIVEN,
    rounded: frozenset[str] = frozenset(),
) -> dict:
    """``compared``: draft tokens and distributions held to the equations; ``wrong``: what differs, in words.

    longest: the engine's max_model_len; tokens behind it are never verified.  exact: the engine computes in float32;
    else a token may be one that the equations like nearly as well.  engines_features: take the engine's.  weights,
    rounded: what the engine drafts by.
    """
    reference = _equations(target, checkpoint, weights, rounded)
    model = None if engines_features else plain_target(target)
    wrong = list(record.wrong)
    compared, unlike, chance = 0, 0, 0.0
    by_request: dict[str, list[Draft]] = {}
    for _, draft in record.finished():
        by_request.setdefault(draft.request, []).append(draft)
    for request, drafts in by_request.items():
        # Later steps of the last drafts alone need the text's last token.
        tokens = torch.tensor(record.texts[request][: max(draft.length for draft in drafts)])
        if model is None:
            kept = record.features[request]
            features = torch.stack([kept[position] for position in range(len(tokens) - 1)]).float()
        else:
            features = reference.read(model, tokens[:-1])
        for width in {len(draft.tokens) for draft in drafts}:
            some = [draft for draft in drafts if len(draft.tokens) == width]
            drafted = torch.tensor([draft.tokens for draft in some])
            lengths = torch.tensor([draft.length for draft in some])
            logits = reference.logits(tokens, features, lengths, drafted)
            moved = [None] * len(some)
            if rounded and exact:
                near = perturbed(reference, tokens, features, lengths, drafted)
                moved = list(2 * torch.stack([spread(other - logits) for other in near]).amax(0))
                drawn = torch.tensor([draft.spread is not None and draft.temperature > 0 for draft in some])
                counted = ~drawn[:, None] & (lengths[:, None] + torch.arange(width) < longest)
                likeliest = logits.argmax(-1)
                unlike += int(((likeliest != drafted) & counted).sum())
                chance += sum(int(((likeliest != other.argmax(-1)) & counted).sum()) for other in near) / len(near)
            for draft, found, off in zip(some, logits, moved, strict=True):
                reached = max(0, min(width, longest - draft.length))
                compared += reached
                wrong += differences(draft, found[:reached], exact, bool(rounded), off) if reached else []
    # Several times what chance moves: a token that is rounded another way moves those of many drafts.
    if unlike > 1.3 * chance + 4 * chance**0.5 + 3:
        wrong.insert(0, f"{unlike} of {compared} draft tokens are not the likeliest, where rounding moves {chance:.0f}")
    return {"compared": compared, "requests": len(by_request), "wrong": wrong[:20], "dropped": record.dropped}


def perturbed(
    reference: ManyDrafts, tokens: Tensor, features: Tensor, lengths: Tensor, drafted: Tensor
) -> list[Tensor]:
    """Three draws of the logits ``[D, K, V]`` where features differ by what float32 sums differ by.

    An input near the middle of two int8 steps is rounded to either, 127ths of its row's largest apart, and moves what
    the next products round, in the drafts of all later tokens too.
    """
    draw = torch.Generator().manual_seed(0)
    noise = [1 + 1e-5 * torch.randn(features.shape, generator=draw) for _ in range(3)]
    return [reference.logits(tokens, features * one, lengths, drafted) for one in noise]


def spread(moves: Tensor) -> Tensor:
    """By how much two of the logits come apart, ``[..., V]`` -> ``[...]``; tokens that are never drafted give NaN."""
    moves = moves.nan_to_num(0.0)
    return moves.amax(-1) - moves.amin(-1)


def differences(
    draft: Draft, logits: Tensor, exact: bool, rounded: bool = False, moved: Tensor | None = None
) -> list[str]:
    """What is wrong with a draft by the reference's logits ``[K, V]``.

    moved ``[K]``: by how much rounding may move two of the logits apart.
    """
    where = f"request {draft.request}, after {draft.length} tokens"
    wrong = [] if draft.confidence is None else unlike_confidences(where, draft, logits)
    if draft.spread is not None and draft.temperature > 0:
        apart = (draft.spread[: len(logits)] - (logits / draft.temperature).softmax(-1)).abs().amax(-1)
        return wrong + [
            f"{where}: distribution {j} is {x:.4f} off"
            for j, x in enumerate(apart.tolist())
            if x > (2e-2 if rounded else 1e-3)
        ]
    # float32 sums in another order differ by 1e-5 of their size; bfloat16 rounds features to 1 part in 256, stage upon
    # stage.
    finite = logits[logits.isfinite()].abs().max()
    allowed = (3e-2 if not exact else 1e-2 if rounded else 1e-4) * finite.clamp(min=1.0).expand(len(logits))
    if moved is not None:
        allowed = allowed.maximum(moved[: len(logits)])
    tokens = torch.tensor(draft.tokens[: len(logits)])
    gaps = logits.amax(-1) - logits.gather(1, tokens[:, None])[:, 0]
    return wrong + [
        f"{where}: draft token {j} is {draft.tokens[j]}, not {int(logits[j].argmax())} ({gap:.4f} better)"
        for j, gap in enumerate(gaps.tolist())
        if not gap <= float(allowed[j])
    ]


def unlike_confidences(where: str, draft: Draft, logits: Tensor) -> list[str]:
    """By vLLM's formula: sigmoid(slope * log-odds of the likeliest token + intercept of the position)."""
    assert draft.confidence is not None
    found, slope, intercepts = draft.confidence
    heated = logits / (draft.temperature or 1.0)
    best = heated.softmax(-1).amax(-1).double()
    odds = (best / (1 - best)).log().clamp(-40, 40)
    wanted = (slope * odds + intercepts[: len(logits)]).sigmoid()
    apart = (found[: len(logits)] - wanted).abs().tolist()
    return [f"{where}: confidence {j} is {gap:.4f} off" for j, gap in enumerate(apart) if gap > 1e-3]
