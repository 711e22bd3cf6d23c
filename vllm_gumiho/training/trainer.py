"""Train a Gumiho drafter for a frozen target with Hugging Face Trainer."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from vllm_gumiho.checkpoint import open_checkpoint, save_speculators
from vllm_gumiho.training.data import PackedRows, Sample, read_samples, split_held_out
from vllm_gumiho.training.drafter import DrafterConfig, GumihoDrafter
from vllm_gumiho.training.objective import FrozenTarget, Objective, TrainingModel
from vllm_gumiho.training.optimizer import MuonWithAdamW

PHASES = ("all", "serial", "heads")
OPTIMIZERS = ("adamw", "muon")


@dataclass
class Recipe:
    """Everything that decides a training run.  Optimiser defaults: AdamW (0.9, 0.95), clip 0.5 (paper, Table 5).

    phase: ``all`` trains everything together; ``serial`` the Transformer alone, at less than half the cost of a
    step; ``heads`` the heads on a frozen Transformer.  init_from: a checkpoint to start from.  optimizer: ``adamw``
    or ``muon``.
    """

    target: str
    data: list[str]
    output: str
    recipe: str = "paper"
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
    phase: str = "all"
    init_from: str | None = None
    cache_features: bool = False
    bf16: bool = True
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def objective(self) -> Objective:
        if self.recipe == "paper":
            objective = Objective.paper(self.num_heads)
        elif self.recipe == "unrolled":
            objective = Objective.unrolled(self.num_heads, self.candidates, self.frequent)
        else:
            raise ValueError(f"recipe {self.recipe!r} is not known; choose 'paper' or 'unrolled'")
        for name, known in (("phase", PHASES), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known; choose one of {', '.join(known)}")
        if self.feature_weight is not None:
            objective = replace(objective, feature_weight=self.feature_weight)
        return replace(objective, train_serial=self.phase != "heads", train_heads=self.phase != "serial")


def drafter_config(target_config: Any, recipe: Recipe) -> DrafterConfig:
    """Draft layers of the target's own shape.  target_config: the target's Hugging Face text config."""
    rope = getattr(target_config, "rope_parameters", None) or {}
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
        num_layers=recipe.num_layers,
        num_serial_steps=recipe.num_serial_steps,
        num_heads=recipe.num_heads,
    )


class DrafterTrainer(Trainer):
    """Trainer that also logs the parts of the loss and answer tokens per second."""

    def __init__(self, *args: Any, use_muon: bool = False, **kwargs: Any):
        self._use_muon = use_muon
        super().__init__(*args, **kwargs)
        self._parts: dict[str, list[Tensor]] = {}
        self._tokens, self._since = 0, time.monotonic()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self._use_muon and getattr(self, "optimizer", None) is None:
            self.optimizer = MuonWithAdamW(self.model.parameters(), self.args.learning_rate)
            return self.optimizer
        return super().create_optimizer(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        if model.training:
            self._tokens += int(inputs["answer"].sum())
            for name, value in outputs.items():
                if name != "loss":
                    self._parts.setdefault(name, []).append(value)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._parts and "loss" in logs:
            logs.update({name: torch.stack(values).mean().item() for name, values in self._parts.items()})
            logs["answer_tokens_per_s"] = self._tokens / (time.monotonic() - self._since)
            self._parts, self._tokens, self._since = {}, 0, time.monotonic()
        super().log(logs, *args, **kwargs)


def acceptance_metrics(prediction: Any) -> dict[str, float]:
    """Held-out accuracy and acceptance per draft position, and the acceptance length of the whole chain (T = 0)."""
    seen, right, accepted = prediction.predictions.sum(0)
    metrics = {"acceptance_length": 1.0 + float(accepted.sum()) / max(1, int(seen[0]))}
    for i in range(len(seen)):
        metrics[f"accuracy_{i + 1}"] = float(right[i]) / max(1, int(seen[i]))
        metrics[f"accepted_{i + 1}"] = float(accepted[i]) / max(1, int(seen[0]))
    return metrics


class ExportCallback(TrainerCallback):
    """Writes the drafter, ready to serve, and recipe.json beside each Trainer checkpoint."""

    def __init__(self, recipe: Recipe, drafter: GumihoDrafter):
        self.recipe, self.drafter = recipe, drafter

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        export(self.drafter, self.recipe, folder / "drafter")
        (folder / "recipe.json").write_text(json.dumps(asdict(self.recipe), indent=2) + "\n")


def export(drafter: GumihoDrafter, recipe: Recipe, folder: Path) -> None:
    """Write the drafter as a speculators-format checkpoint that the engine serves."""
    c = drafter.config
    save_speculators(
        folder,
        {name: value.detach().cpu().contiguous() for name, value in drafter.state_dict().items()},
        verifier=recipe.target,
        layer_config={
            "model_type": "llama", "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
            "num_attention_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads,
            "rms_norm_eps": c.rms_norm_eps, "vocab_size": c.vocab_size,
            "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        },
    )  # fmt: skip


def train(recipe: Recipe, resume: bool = False) -> dict[str, float]:
    """Run (or resume) a training run; returns the final held-out metrics.

    Raises: DataError for unusable data, ValueError for an unknown recipe or nothing to resume.
    """
    set_seed(recipe.seed)
    objective = recipe.objective()
    model = AutoModelForCausalLM.from_pretrained(recipe.target, dtype=torch.float32, attn_implementation="sdpa")
    text_config = model.config.get_text_config()
    samples = read_samples(map(Path, recipe.data), text_config.vocab_size)
    training, held_out = split_held_out(samples, recipe.held_out, recipe.seed)
    train_rows = PackedRows(_shuffled(training, recipe.seed), recipe.row_length)
    eval_rows = PackedRows(held_out, recipe.row_length, first_index=len(train_rows))
    eval_rows.rows = eval_rows.rows[: recipe.eval_rows]

    target = FrozenTarget(model, recipe.cache_features)
    drafter = GumihoDrafter(drafter_config(text_config, recipe))
    probe = {name: value[None] for name, value in train_rows[0].items()}
    drafter.init_weights(float(target.probe_scale(probe)), float(target.embed.float().square().mean().sqrt()))
    if recipe.init_from:
        drafter.load_state_dict(dict(open_checkpoint(recipe.init_from).tensors()))
    if recipe.phase == "heads":
        drafter.fc.requires_grad_(False)
        drafter.layers.requires_grad_(False)
    counts = train_rows.token_counts(text_config.vocab_size)
    frequent = counts.argsort(descending=True)[: recipe.frequent]
    frequent = frequent[counts[frequent] > 0]

    settings: dict[str, Any] = {
        "output_dir": recipe.output, "max_steps": recipe.steps, "per_device_train_batch_size": recipe.rows,
        "per_device_eval_batch_size": 1, "learning_rate": recipe.learning_rate, "lr_scheduler_type": "cosine",
        "warmup_steps": int(recipe.warmup_ratio * recipe.steps), "adam_beta1": 0.9, "adam_beta2": 0.95,
        "weight_decay": 0.0, "max_grad_norm": 0.5, "bf16": recipe.bf16, "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 20, "eval_strategy": "steps", "eval_steps": recipe.save_every, "save_strategy": "steps",
        "save_steps": recipe.save_every, "save_total_limit": 2, "remove_unused_columns": False,
        "label_names": ["index"], "seed": recipe.seed, "report_to": ["tensorboard"], "dataloader_num_workers": 0,
    }  # fmt: skip
    arguments = TrainingArguments(**(settings | recipe.extra))
    trainer = DrafterTrainer(
        use_muon=recipe.optimizer == "muon",
        model=TrainingModel(drafter, objective, target, frequent),
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        compute_metrics=acceptance_metrics,
        callbacks=[ExportCallback(recipe, drafter)],
    )
    trainer.train(resume_from_checkpoint=resume or None)
    metrics = trainer.evaluate()
    export(drafter, recipe, Path(recipe.output) / "final")
    (Path(recipe.output) / "final" / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    (Path(recipe.output) / "final" / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def _shuffled(samples: list[Sample], seed: int) -> list[Sample]:
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [samples[i] for i in order]
