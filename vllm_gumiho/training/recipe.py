"""Everything that decides a training run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from vllm_gumiho.training.drafter import DrafterConfig
from vllm_gumiho.training.errors import RecipeError
from vllm_gumiho.training.objective import Objective

CHOICES = {
    "recipe": ("paper", "unrolled", "eagle"),
    "phase": ("all", "serial", "heads"),
    "optimizer": ("adamw", "muon", "muon-serial"),
    "init": ("random", "target"),
}


@dataclass
class Recipe:
    """A training run.  Optimiser defaults: AdamW (0.9, 0.95), clip 0.5 (paper, Table 5).

    recipe: ``unrolled`` trains on what drafting sees, ``paper`` teacher-forces both serial steps, ``eagle`` is
    EAGLE-1 (one layer, no heads, served by vLLM's own method ``eagle``).
    phase: ``all`` trains everything together; ``serial`` the Transformer alone, at less than half the cost of a
    step; ``heads`` the heads on a frozen Transformer.
    optimizer: ``adamw``, the paper's; ``muon``, for matrices; ``muon-serial``, for the Transformer's alone: Muon's
    own products cost the same at any batch, most of them for the heads, and on small batches they weigh.
    init: ``random`` small layers that pass the feature through, or ``target``, its own last layers.  init_from: a
    checkpoint to start from.
    early_weighting: weight positions by how much they matter to the accepted length (unrolled only).
    heads_steer: let the heads' losses train the Transformer too (unrolled only; `paper` always does).
    further_steps: serial steps trained beyond the ``num_serial_steps`` that are served (unrolled only).
    own_tokens: share of anchors that draft on from the drafter's own token at the end of training, rising from 0.
    draft_vocab: draft only that many of the training answers' most frequent tokens; 0 drafts all.
    feature_cache: folder that keeps the target's features between epochs and runs.
    evaluation_prompts: folders or files of prompts that must not be in the data.
    patience: end when held-out acceptance length has not risen for that many evaluations; 0 never does.
    """

    target: str
    data: list[str]
    output: str
    recipe: str = "unrolled"
    num_serial_steps: int = 2
    num_heads: int = 5
    num_layers: int = 2
    steps: int = 1000
    rows: int = 2
    row_length: int = 1024
    optimizer: str = "adamw"
    learning_rate: float = 5e-4
    warmup_ratio: float = 0.03
    held_out: float = 0.02
    eval_rows: int = 16
    save_every: int = 200
    candidates: int = 4096
    frequent: int = 2048
    feature_weight: float | None = None
    early_weighting: bool = True
    heads_steer: bool = False
    further_steps: int = 0
    own_tokens: float = 0.0
    draft_vocab: int = 0
    phase: str = "all"
    init: str = "random"
    init_from: str | None = None
    feature_cache: str | None = None
    evaluation_prompts: list[str] = field(default_factory=list)
    patience: int = 0
    bf16: bool = True
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises: RecipeError naming the setting that is wrong."""
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise RecipeError(f"{name} {getattr(self, name)!r} is not known; choose one of {', '.join(known)}")
        for name in ("steps", "rows", "row_length", "num_layers", "num_serial_steps", "save_every", "learning_rate"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("num_heads", "further_steps", "draft_vocab", "patience", "candidates", "frequent"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must not be below 0")
        for name in ("own_tokens", "held_out", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.recipe == "eagle" and (self.phase != "all" or self.init_from or self.draft_vocab):
            raise RecipeError("recipe 'eagle' has one phase, its own start and the whole vocabulary")
        if self.further_steps and (self.recipe != "unrolled" or self.phase == "heads"):
            raise RecipeError(
                f"further_steps is {self.further_steps}; recipe {self.recipe!r}, phase {self.phase!r} takes none"
            )
        if self.recipe != "eagle" and self.num_heads == 0:
            raise RecipeError("num_heads is 0; a Gumiho drafter has at least one head")

    def objective(self, vocabulary: Tensor | None = None) -> Objective:
        """Losses of this run.  vocabulary: ids that may be drafted, ascending."""
        if self.recipe == "unrolled":
            objective = Objective.unrolled(self.num_heads, self.candidates, self.frequent)
            objective = replace(objective, heads_steer=self.heads_steer, further_steps=self.further_steps)
        else:
            objective = Objective.paper(self.num_heads) if self.recipe == "paper" else Objective.eagle()
            objective = replace(objective, candidates=self.candidates, frequent=self.frequent)
        if not self.early_weighting:
            mean = sum(objective.head_weights) / max(1, self.num_heads)
            objective = replace(objective, chain_floor=1.0, serial_decay=1.0, head_weights=(mean,) * self.num_heads)
        if self.feature_weight is not None:
            objective = replace(objective, feature_weight=self.feature_weight)
        return replace(
            objective, vocabulary=vocabulary, train_serial=self.phase != "heads", train_heads=self.phase != "serial"
        )

    def drafter_config(self, target_config: Any) -> DrafterConfig:
        """Draft layers of the target's own shape.  target_config: the target's Hugging Face text config."""
        rope = getattr(target_config, "rope_parameters", None) or {}
        eagle = self.recipe == "eagle"
        return DrafterConfig(
            hidden_size=target_config.hidden_size,
            intermediate_size=target_config.intermediate_size,
            num_attention_heads=target_config.num_attention_heads,
            num_key_value_heads=target_config.num_key_value_heads,
            head_dim=getattr(target_config, "head_dim", None)
            or target_config.hidden_size // target_config.num_attention_heads,
            rope_theta=float(rope.get("rope_theta", getattr(target_config, "rope_theta", 10000.0))),
            rms_norm_eps=target_config.rms_norm_eps,
            vocab_size=target_config.vocab_size,
            num_layers=1 if eagle else self.num_layers,
            num_serial_steps=self.num_serial_steps + self.num_heads if eagle else self.num_serial_steps,
            num_heads=0 if eagle else self.num_heads,
            fc_bias=not eagle,
        )
