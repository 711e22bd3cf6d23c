"""Everything that decides a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_gumiho.errors import RecipeError
from vllm_gumiho.options import TARGET, option

CHOICES = {
    "phase": ("all", "serial", "heads"),
    "optimizer": ("adamw", "muon", "muon-serial"),
    "init": ("linear", "random", "target", None),
    "schedule": ("cosine", "stable"),
}
# Recipes of a drafter that no start in closed form is known for.
WITHOUT_FIT = ("moa", "moa-paper")

# Of the learning rate, for an fc that was fitted.
FITTED_RATE = 0.1


@dataclass
class Recipe:
    """A training run.  Optimiser defaults: AdamW (0.9, 0.95), clip 0.5 (paper, Table 5).

    recipe: an entry of `vllm_gumiho.training.recipes.RECIPES`.
    phase: ``all`` trains everything together; ``serial`` the Transformer alone, at less than half the cost of a
    step; ``heads`` the heads on a frozen Transformer.
    optimizer: ``adamw``, the paper's; ``muon``, for matrices; ``muon-serial``, for the Transformer's alone: Muon's
    own products cost the same at any batch, most of them for the heads, and on small batches they weigh.
    init: ``linear``, a linear fit in closed form (`vllm_gumiho.training.start`); ``random`` small layers that pass the
    feature through; or ``target``, its own last layers.  None is ``linear``, for MoA ``random``.  init_from: a
    checkpoint to start from.
    fc_rate: of the learning rate, for ``fc`` and what makes a feature of several layers; None is `FITTED_RATE` for a
    linear start, else 1: at the full rate the fit is lost within 50,000 tokens.
    schedule: after the warm-up ``cosine`` decay over the whole run, or a ``stable`` rate, that decays in the last
    ``decay_steps`` steps.  branch_from: a checkpoint of another run that this one goes on from, so that a stable run
    can be decayed from any of its checkpoints while it goes on itself.
    shares: ``KIND=SHARE`` of the answer tokens, a kind being a data file's name; none takes all data as it is.
    early_weighting: weight positions by how much they matter to the accepted length (unrolled only).
    heads_steer: let the heads' losses train the Transformer too (unrolled only; `paper` always does).
    further_steps: serial steps trained beyond the ``num_serial_steps`` that are served (unrolled only).
    own_tokens: share of anchors that draft on from the drafter's own token at the end of training, rising from 0.
    target_layers: whose states MoA and ``unrolled-layers`` read, from 0, the input of the first, to the number of
    layers, the state after the last; none takes a half, two thirds, five sixths and the last.
    draft_vocab: draft only that many of the training answers' most frequent tokens; 0 drafts all.
    feature_cache: folder that keeps the target's features between epochs and runs.  feature_memory: GiB of the
    device's memory that keep them between epochs instead.
    evaluation_prompts: folders or files of prompts that must not be in the data.
    patience: end when held-out acceptance length has not risen for that many evaluations; 0 never does.
    """

    target: str = option(help=TARGET)
    data: list[str] = option(help="Files or folders written by 'vllm-gumiho generate'; repeat.")
    output: str = option(help="Folder for checkpoints and the finished drafter.")
    recipe: str = option(
        "unrolled",
        "'unrolled' (on its own features), 'unrolled-layers' (the first step reads several layers), 'paper' "
        "(teacher-forced), 'eagle' (EAGLE-1), 'moa', 'moa-paper'.",
    )
    num_serial_steps: int = option(2, "Tokens drafted by the Transformer.")
    num_heads: int = option(5, "Tokens drafted by heads.")
    num_layers: int = option(2, "Layers of the Transformer.")
    steps: int = option(1000, "Optimizer steps.")
    rows: int = option(2, "Packed rows a step and device.")
    row_length: int = option(1024, "Tokens a packed row.")
    optimizer: str = option("adamw", "'adamw' (the paper's), 'muon', or 'muon-serial' (AdamW for the heads).")
    learning_rate: float = option(5e-4, "At its highest.")
    fc_rate: float | None = option(None, "Of it, for what a linear start fits; 0.1 after one, else 1.")
    warmup_ratio: float = option(0.03, "Share of the steps in which it rises.")
    schedule: str = option("cosine", "'cosine' decay over the run, or 'stable' until the last --decay-steps.")
    decay_steps: int = option(0, "Steps at the end in which a stable rate falls to 0.")
    held_out: float = option(0.02, "Share of the conversations that is measured on and not trained on.")
    eval_rows: int = option(16, "Packed rows of each kind of them, at the most.")
    shares: list[str] = option([], "KIND=SHARE of the answer tokens, a kind being a data file's name; repeat.")
    save_every: int = option(200, "Steps between checkpoints and held-out measurements.")
    save_minutes: float = option(0.0, "Minutes between further checkpoints; 0 makes none.")
    candidates: int = option(4096, "Tokens drawn for the cross-entropy; 0 takes all.")
    frequent: int = option(2048, "Frequent tokens always in the cross-entropy.")
    feature_weight: float | None = option(None, "Weight of the feature loss; the recipe's own.")
    early_weighting: bool = option(True, "Early positions weigh more (unrolled).")
    heads_steer: bool = option(False, "Heads' losses train the Transformer too (unrolled).")
    further_steps: int = option(0, "Serial steps trained beyond those served (unrolled).")
    own_tokens: float = option(0.0, "Share of anchors that draft on from the drafter's own token when training ends.")
    target_layers: list[int] = option(
        [], "Target layers whose states are read (MoA, unrolled-layers); repeat.  Default: four of the last half."
    )
    draft_vocab: int = option(0, "Draft only the N most frequent answer tokens; 0 is all.")
    phase: str = option("all", "'all', 'serial' (Transformer alone) or 'heads' (on a frozen one).")
    init: str | None = option(
        None, "'linear' (fit in closed form; the default), 'random' (MoA's) or 'target' (the target's last layers)."
    )
    fit_tokens: int = option(1_000_000, "Answer tokens that a linear start is fitted on, at the most.")
    init_from: str | None = option(None, "Checkpoint to start from.")
    branch_from: str | None = option(None, "Folder checkpoint-N of another run to go on from, optimizer and all.")
    feature_cache: str | None = option(None, "Folder that keeps target features (bfloat16).")
    feature_memory: float = option(0.0, "GiB of the device's memory that keep target features; in place of a cache.")
    evaluation_prompts: list[str] = option(
        [], "Prompts that must not be in the data: file or folder; repeat.  Found ones are named."
    )
    patience: int = option(0, "End when held-out acceptance has not risen for N measurements; 0 never.")
    bf16: bool = option(True, "bfloat16 autocast.")
    seed: int = option(0, "Of weights, order and draws.")
    extra: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises: RecipeError naming the setting that is wrong."""
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                names = ", ".join(filter(None, known))
                raise RecipeError(f"{name} {getattr(self, name)!r} is not known; choose one of {names}")
        for name in (
            "steps",
            "rows",
            "row_length",
            "num_layers",
            "num_serial_steps",
            "save_every",
            "learning_rate",
            "fit_tokens",
            "eval_rows",
        ):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in (
            "num_heads", "further_steps", "draft_vocab", "patience", "candidates", "frequent", "decay_steps",
            "save_minutes", "feature_memory",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must not be below 0")
        for name in ("own_tokens", "held_out", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.fc_rate is not None and self.fc_rate < 0:
            raise RecipeError(f"fc_rate is {self.fc_rate}; it must not be below 0")
        if self.feature_memory and self.feature_cache:
            raise RecipeError(
                f"feature_memory {self.feature_memory:g}: feature_cache {self.feature_cache} keeps the features; give "
                "one of the two"
            )
        self.share_of_kind()

    def share_of_kind(self) -> dict[str, float]:
        """``shares`` as numbers.  Raises: RecipeError for one of another form."""
        found = {}
        for text in self.shares:
            kind, _, share = text.rpartition("=")
            try:
                found[kind] = float(share)
            except ValueError:
                found[kind] = -1.0
            if not kind or found[kind] <= 0:
                raise RecipeError(f"shares {text!r} is not KIND=SHARE with a share above 0, as in mix=0.5")
        return found

    @property
    def start(self) -> str:
        """``init``, or the recipe's own."""
        return self.init or ("random" if self.recipe in WITHOUT_FIT else "linear")

    @property
    def rate_of_fc(self) -> float:
        """``fc``'s learning rate, of the others'."""
        if self.fc_rate is not None:
            return self.fc_rate
        return FITTED_RATE if self.start == "linear" and self.init_from is None else 1.0
