"""The frozen target: its embedding, its LM head and its features, kept in a store between epochs and runs.

Features and logits are those of the model's own forward pass in transformers, whatever the model: its own masks, its
own attention, and what it does before and after its LM head (`vllm_gumiho.training.target_head`).
Beside the last hidden states, a drafter may read the states at the inputs of some layers: they lie behind them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vllm_gumiho.errors import RecipeError
from vllm_gumiho.training.data import segment_spans
from vllm_gumiho.training.store import FeatureStore, KeptFeatures, key_of
from vllm_gumiho.training.target_head import head_reads, read_head
from vllm_gumiho.training.target_model import load_target, passes_alone

# Sequences of one pass are padded to the longest: the shortest has at least that share of its length.  A GPU pads more
# for a target of few parameters: its passes are as long as their launches take, and a step's sequences are many passes.
ALIKE, _ALIKE_ON_GPU, _FEW = 0.7, 0.35, 1_000_000_000
# About so many values of each parameter tell targets apart.
SAMPLED = 256
# Tokens of one pass, padding included, and of what is computed before it is stored; times that on a GPU.
PASS_TOKENS, FILL_TOKENS, _ON_GPU = 4096, 8192, 8


def open_target(
    folder: str,
    cache: str | Path | None = None,
    device: torch.device | None = None,
    layers: Callable[[Any], tuple[int, ...]] = lambda config: (),
) -> FrozenTarget:
    """The frozen target of a folder.  device: None is a GPU where there is one.

    layers: those of `FrozenTarget`, for the target's Hugging Face text config.
    Raises: TargetError, and RecipeError for layers that it does not have.
    """
    model = load_target(folder)
    target = FrozenTarget(model, cache, folder, layers(model.config.get_text_config()))
    return target.to(device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))


class FrozenTarget:
    """The target's embedding, LM head and features.

    Features are what the LM head reads: mostly the hidden states after the final norm (what a vLLM model's
    ``forward`` returns).  cache: a folder in which the features of a sequence are kept as bfloat16 (`FeatureStore`), so
    that later epochs and other runs on the same conversations need no target pass; None computes them anew each time.
    name: for messages.  layers: of which the states at their inputs follow the features, in this order, each of width
    H; layer number L of a target of L layers is what comes out of its last one, before the final norm.  ``width`` is H
    with these.  Raises: TargetError for a model whose head cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: str | Path | None = None,
        name: str | None = None,
        layers: tuple[int, ...] = (),
    ):
        self.model = model.eval().requires_grad_(False)
        self.name = name or model.config.name_or_path
        self.layers = tuple(layers)
        if self.layers:
            self._check_layers()
        self._take_tensors()
        self.width = (1 + len(self.layers)) * self.embed.shape[1]
        self.store: FeatureStore | KeptFeatures | None = None
        if cache:
            of = "".join(f"-{layer}" for layer in self.layers)
            self.store = FeatureStore(Path(cache), self._fingerprint() + of, self.width)

    def keep_features(self, gibibytes: float) -> None:
        """Keep features in the device's memory between epochs, as much as that; no store is written then."""
        self.store = KeptFeatures(self.width, self.embed.device, gibibytes * 2**30)

    def to(self, device: torch.device) -> FrozenTarget:
        """Move to the device that the batches are on; nothing is done when it is there."""
        if self.embed.device != device:
            self.model.to(device)
            self._take_tensors()
        return self

    @torch.no_grad()
    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """``[R, T, width]`` for rows of ``input_ids`` and ``segments`` ``[R, T]``; zeros where there is padding.

        bfloat16 from the store, else in the target's dtype.
        """
        if self.store is None:
            return self.compute(batch)
        spans, keys = self._keys(batch)
        missing = {key: span for span, key in zip(spans, keys, strict=True) if key not in self.store}
        new: dict[bytes, Tensor] = {}
        if missing:
            ids = batch["input_ids"]
            found = self.compute_sequences([ids[row, a:b] for row, a, b in missing.values()])
            new = dict(zip(missing, found, strict=True))
            self.store.append(new.items())
        out = torch.zeros(*batch["input_ids"].shape, self.store.width, dtype=torch.bfloat16, device=self.store.device)
        for (row, a, b), key in zip(spans, keys, strict=True):
            out[row, a:b] = new[key] if key in new else self.store.read(key)
        return out.to(self.embed.device)

    @torch.no_grad()
    def compute(self, batch: dict[str, Tensor]) -> Tensor:
        """`features` anew, whatever the store has; in the target's dtype."""
        ids = batch["input_ids"]
        spans = segment_spans(batch["segments"])
        out = torch.zeros(*ids.shape, self.width, device=ids.device, dtype=self.embed.dtype)
        for (row, a, b), found in zip(spans, self.compute_sequences([ids[r, a:b] for r, a, b in spans]), strict=True):
            out[row, a:b] = found
        return out

    def is_cached(self, batch: dict[str, Tensor]) -> bool:
        """Whether the store has every sequence of the batch."""
        return self.store is not None and all(key in self.store for key in self._keys(batch)[1])

    @torch.no_grad()
    def fill(self, sequences: Sequence[list[int]], bf16: bool, advance: Callable[[int], None] = lambda _: None) -> int:
        """Compute what the store lacks of these sequences, in their order; returns how many tokens that were.

        bf16: bfloat16 autocast.  advance: told the tokens of sequences that are there, as they come.
        """
        store, device, done = self.store, self.embed.device, 0
        assert store is not None
        waiting: dict[bytes, Tensor] = {}

        def run() -> int:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                store.append(zip(waiting, self.compute_sequences(list(waiting.values())), strict=True))
            size = sum(map(len, waiting.values()))
            advance(size)
            waiting.clear()
            return size

        for tokens in sequences:
            key = key_of(np.array(tokens))
            if key in store or key in waiting:
                advance(len(tokens))
                continue
            waiting[key] = torch.tensor(tokens, device=device)
            if sum(map(len, waiting.values())) >= self._scaled(FILL_TOKENS):
                done += run()
        return done + (run() if waiting else 0)

    def compute_sequences(self, sequences: list[Tensor]) -> list[Tensor]:
        """Features of sequences of token ids: those of like lengths in one causal pass, padded at their ends."""
        found: list[Tensor] = [torch.empty(0)] * len(sequences)
        alike = ALIKE if self._on_cpu or self.model.num_parameters() > _FEW else _ALIKE_ON_GPU
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        while order:
            longest = len(sequences[order[0]])
            most = 1 if self._alone else max(1, self._scaled(PASS_TOKENS) // longest)
            group = [i for i in order[:most] if len(sequences[i]) >= alike * longest]
            order = order[len(group) :]
            # Under a causal mask nothing that follows a token reaches it, so no mask for the padding is needed.
            ids = nn.utils.rnn.pad_sequence([sequences[i] for i in group], batch_first=True)
            hidden = self._pass(ids)
            for i, features in zip(group, hidden, strict=True):
                found[i] = features[: len(sequences[i])]
        return found

    def _scaled(self, tokens: int) -> int:
        return tokens if self._on_cpu else _ON_GPU * tokens

    @property
    def _on_cpu(self) -> bool:
        return self.embed.device.type == "cpu"

    def _pass(self, ids: Tensor) -> Tensor:
        """Features ``[R, T, width]`` of token ids ``[R, T]``."""
        base, states = self.model.base_model, {}

        def keep(layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
                states[layer] = given[0] if given else named["hidden_states"]

            return hook

        places = [*base.layers, base.norm] if self.layers else []
        hooks = [places[layer].register_forward_pre_hook(keep(layer), with_kwargs=True) for layer in self.layers]
        try:
            with head_reads(self.model) as read:
                self.model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([read[0], *(states[layer].to(read[0].dtype) for layer in self.layers)], dim=-1)

    @torch.no_grad()
    def masked(self, ids: Tensor, positions: Tensor, sees: Tensor) -> Tensor:
        """Features ``[R, T, H]`` of token ids at positions ``[R, T]``, in any order; without states.

        sees bool ``[R, T, T]``: which of them each sees, beside itself.  Raises: RecipeError for a target that hides
        more than a causal mask does.
        """
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ()
        windows = getattr(config, "sliding_window", None) if not kinds else None
        if windows or set(kinds) - {"full_attention"} or self.model.config._attn_implementation != "sdpa":
            raise RecipeError(
                f"own_tokens: target {self.name} attends in another way than to all tokens before, and judges no "
                "chains of drafted tokens; train without --own-tokens"
            )
        attends = sees | torch.eye(sees.shape[-1], dtype=torch.bool, device=sees.device)
        with head_reads(self.model) as read:
            self.model(input_ids=ids, position_ids=positions, attention_mask=attends[:, None], use_cache=False)
        return read[0]

    def _check_layers(self) -> None:
        count = len(getattr(self.model.base_model, "layers", ()))
        if not count or not hasattr(self.model.base_model, "norm"):
            raise RecipeError(
                f"target {self.name}: {type(self.model).__name__} has no list of layers with a norm after it, whose "
                "states are read; train recipe unrolled, paper or eagle for this target"
            )
        wrong = [layer for layer in self.layers if not 0 <= layer <= count]
        if wrong:
            raise RecipeError(
                f"target_layers {', '.join(map(str, wrong))}: the target has {count} layers; choose from 0, the input "
                f"of the first, to {count}, the state after the last"
            )

    def _take_tensors(self) -> None:
        self.embed = self.model.get_input_embeddings().weight.detach()
        head, self.reads_last_state = read_head(self.model, self.name)
        tied = head.weight.data_ptr() == self.embed.data_ptr() and head.weight.shape == self.embed.shape
        self.lm_head = replace(head, weight=self.embed) if tied else head
        self._alone = passes_alone(self.model.config)

    def _fingerprint(self) -> str:
        """Tells targets apart by their config and by values of every parameter, which may be tuned apart."""
        digest = hashlib.sha256(repr(sorted(self.model.config.to_diff_dict().items())).encode())
        for name, parameter in sorted(self.model.base_model.named_parameters()):
            values = parameter.detach().flatten()
            some = values[:: max(1, len(values) // SAMPLED)].float().cpu()
            digest.update(name.encode() + some.numpy().tobytes())
        if not self.reads_last_state:
            digest.update(b"what the LM head reads")
        return digest.hexdigest()[:16]

    @staticmethod
    def _keys(batch: dict[str, Tensor]) -> tuple[list[tuple[int, int, int]], list[bytes]]:
        """Spans of the batch's sequences, and their keys."""
        spans, ids = segment_spans(batch["segments"]), batch["input_ids"].cpu().numpy()
        return spans, [key_of(ids[row, a:b]) for row, a, b in spans]
