"""What a drafter is: its tensors, vLLM model and trainable twin, what it reads, and what it drafts in which passes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig

    from vllm_gumiho.checkpoint.files import TensorInfo


class Sizes(Protocol):
    """What a checkpoint's tensors say.  Rows of q and k projections are head counts times the head dimension.

    draft_vocab_size: of drafters over a part of the target's vocabulary, else None.
    """

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def query_size(self) -> int: ...
    @property
    def key_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def vocab_size(self) -> int | None: ...
    @property
    def draft_vocab_size(self) -> int | None: ...

    @property
    def max_draft_tokens(self) -> int:
        """K of a full draft."""
        ...

    def passes(self) -> str:
        """What drafts its K tokens, in words."""
        ...


@dataclass(frozen=True)
class RoundBytes:
    """Bytes read by one serial step, by all heads, each with their pass over the LM head, and by a whole round.

    The round has what makes a feature of several layers too, once.
    """

    serial: int
    heads: int
    total: int


class Drafter(Protocol):
    """One architecture that is trained here and served by an unmodified vLLM.

    Places in vLLM and in this package are ``"module:name"``, so that knowing a drafter imports nothing heavy.
    """

    @property
    def name(self) -> str:
        """The method that a user writes; also the type of speculators checkpoints."""
        ...

    @property
    def title(self) -> str:
        """Its name in messages."""
        ...

    @property
    def architecture(self) -> str:
        """Of the draft model in an engine's config: what tells this drafter from others further down."""
        ...

    @property
    def vllm_method(self) -> str:
        """The method of vLLM's own that it is served as: ``eagle``, or ``eagle3`` for features of several layers."""
        ...

    @property
    def model(self) -> str:
        """Its vLLM model."""
        ...

    @property
    def trainable(self) -> str:
        """Its trainable twin, a torch module with the same tensors."""
        ...

    @property
    def runners(self) -> Mapping[str, str]:
        """vLLM's classes that draft, one a model runner, to the subclasses that draft with it."""
        ...

    @property
    def reads(self) -> str:
        """Which of the target's features it reads, in words."""
        ...

    @property
    def drafts(self) -> str:
        """What it drafts in which passes, in words."""
        ...

    @property
    def released(self) -> Mapping[str, str]:
        """Published checkpoints by the target that each was made for."""
        ...

    @property
    def hub_prefix(self) -> str:
        """Names of published checkpoints begin with it, in lower case."""
        ...

    @property
    def also_named(self) -> Collection[str]:
        """Other drafters by whose name a request may mean it."""
        ...

    @property
    def takes_eight_bits(self) -> bool:
        """Whether its vLLM model keeps matrices in 8 bits (``draft_weights``)."""
        ...

    def round_bytes(self, sizes: Any, vocab_size: int, weights: str) -> RoundBytes:
        """What a round reads, of weights in ``bf16``, ``fp8`` or ``int8``; asked where it `takes_eight_bits`."""
        ...

    def has_tensors(self, names: Collection[str]) -> bool:
        """Whether these are the tensor names of such a drafter, whole or not."""
        ...

    def read_sizes(self, where: Path, infos: dict[str, TensorInfo], config: Mapping[str, Any] | None) -> Sizes:
        """Sizes, after checking that the tensors are exactly those of one drafter.

        config: of the checkpoint, for what no tensor tells.  Raises: CheckpointError.
        """
        ...

    def layer_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a published config.json says of the draft layers, where it is not the speculators format's."""
        ...

    @property
    def config_keys(self) -> tuple[str, ...]:
        """What config.json says of it beside what every drafter's says; the vLLM model reads these."""
        ...

    def config_fields(self, sizes: Any, num_attention_heads: int) -> dict[str, Any]:
        """Values of ``config_keys``.  num_attention_heads: of the draft layers."""
        ...

    def fit(self, where: Path, sizes: Any, target: ModelConfig, parallel: ParallelConfig | None) -> dict[str, Any]:
        """Values of ``config_keys`` that hang on the target.

        where: the checkpoint.  parallel: None where no engine is to be started with it.
        Raises: CheckpointError where the target lacks what the drafter reads.
        """
        ...

    def lacking_in_v2(self, vllm_config: Any) -> list[str]:
        """What this engine asks for that the drafter cannot have in model runner V2, with the remedy."""
        ...
