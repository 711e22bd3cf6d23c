"""Train a drafter for a frozen target with Hugging Face Trainer."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from vllm_gumiho.errors import DataError, RecipeError
from vllm_gumiho.files import write_json
from vllm_gumiho.training.callbacks import ExportCallback, TimedCheckpoints, drafter_tensors, export
from vllm_gumiho.training.data import (
    CUT_AWAY,
    PackedRows,
    Sample,
    in_words,
    mixed,
    read_samples,
    split_held_out,
)
from vllm_gumiho.training.decontaminate import refuse_evaluation_prompts
from vllm_gumiho.training.metrics import acceptance_metrics
from vllm_gumiho.training.optimizer import MuonWithAdamW, apart
from vllm_gumiho.training.provenance import made_with, read_recipe
from vllm_gumiho.training.recipe import Recipe
from vllm_gumiho.training.recipes import kind_of, new_drafter, objective_of
from vllm_gumiho.training.speed import SpeedMeter, training_flops
from vllm_gumiho.training.start import start
from vllm_gumiho.training.target import open_target
from vllm_gumiho.training.target_model import refuse_placeholders

STATE = "trainer_state.json"
logger = logging.getLogger("vllm_gumiho")


class DrafterTrainer(Trainer):
    """Trainer that also logs the parts of the loss and the speed of training."""

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any):
        self._recipe = recipe
        super().__init__(*args, **kwargs)
        self._parts: dict[str, list[Tensor]] = {}
        self._meter: SpeedMeter | None = None
        # Counted here: a model that FSDP has sharded computes nothing outside its own forward pass.
        rows = [
            self.train_dataset[i] for i in range(min(self.args.per_device_train_batch_size, len(self.train_dataset)))
        ]
        self.model.to(self.args.device)
        self.flops = training_flops(self.model, self.data_collator(rows))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer | None = getattr(self, "optimizer", None)
        if made is not None:
            return made
        drafter, name, rate = self.model.drafter, self._recipe.optimizer, self._recipe.rate_of_fc
        fc = list(drafter.fitted_parameters())
        if name.startswith("muon"):
            heads = drafter.head_parameters() if name == "muon-serial" else ()
            self.optimizer = MuonWithAdamW(self.model.parameters(), self.args.learning_rate, heads, fc, rate)
            return self.optimizer
        optimizer = super().create_optimizer(*args, **kwargs)
        if fc and rate != 1.0:
            apart(optimizer, fc, rate * self.args.learning_rate)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The checkpoint's state, at the rates of this run: optimiser and schedule save those they were made with."""
        rates = list(self.lr_scheduler.base_lrs)
        super()._load_optimizer_and_scheduler(checkpoint)
        saved, self.lr_scheduler.base_lrs = self.lr_scheduler.base_lrs, rates
        for group, rate, before in zip(self.optimizer.param_groups, rates, saved, strict=True):
            group["initial_lr"] = rate
            group["lr"] *= rate / before if before else 1.0
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what is logged

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self._meter is None:
            dtype = torch.bfloat16 if self.model.bf16 else torch.float32
            self._meter = SpeedMeter(self.args.device, dtype)
        target, drafter = self.flops
        flops = drafter if self.model.target_is_cached(inputs) else target + drafter
        tokens = int(inputs["answer"].sum())
        self._meter.add(tokens, flops)
        # Trainer keeps this number in its checkpoints and does not touch it itself unless asked to.
        self.state.num_input_tokens_seen += tokens * self.args.world_size
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        if model.training:
            for name, value in outputs.items():
                if name != "loss":
                    self._parts.setdefault(name, []).append(value)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._parts and "loss" in logs:
            logs.update({name: torch.stack(values).mean().item() for name, values in self._parts.items()})
            if self._meter is not None:
                logs.update(self._meter.read())
            self._parts = {}
        if self._meter is not None:
            logs["answer_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, *args, **kwargs)


def train(recipe: Recipe, resume: bool = False) -> dict[str, float]:
    """Run a training run, or go on from its last checkpoint; returns the final held-out metrics.

    One process trains on one device; under ``torchrun`` or ``accelerate launch`` every process takes its share of the
    rows.  Raises: RecipeError for a wrong setting, DataError for unusable data or evaluation prompts in it.
    """
    kind = kind_of(recipe)
    set_seed(recipe.seed)
    last = last_checkpoint(Path(recipe.output)) if resume else recipe.branch_from
    if last is not None and not Path(last, STATE).is_file():
        raise RecipeError(f"branch_from {last}: no whole checkpoint there; give a run's folder checkpoint-N")
    if not resume and any(Path(recipe.output).glob(f"checkpoint-*/{STATE}")):
        raise RecipeError(
            f"{recipe.output}: has checkpoints of a run; go on with it by --resume, or give another --output"
        )
    if last is not None:
        _tell_of_other_rows(recipe, Path(last))
    # Before the arguments start a process group: under FSDP all but one process would then read no weights.
    target = open_target(
        recipe.target, recipe.feature_cache, torch.device("cpu"), lambda config: kind.layers(recipe, config)
    )
    arguments = _arguments(recipe)
    target.to(arguments.device)
    if recipe.feature_memory:
        target.keep_features(recipe.feature_memory)
    text_config = target.model.config.get_text_config()
    left_out: Counter[str] = Counter()
    samples = read_samples(map(Path, recipe.data), text_config.vocab_size, left_out)
    refuse_placeholders(samples, target.model.config, recipe.target)
    if recipe.evaluation_prompts:
        refuse_evaluation_prompts(samples, recipe.target, recipe.evaluation_prompts)
    training, held_out = split_held_out(samples, recipe.held_out, recipe.seed)
    training = mixed(training, recipe.share_of_kind(), recipe.seed)
    train_rows = PackedRows(_shuffled(training, recipe.seed), recipe.row_length)
    eval_rows, kinds = PackedRows.of_kinds(held_out, recipe.row_length, recipe.eval_rows)

    check_rows(recipe, len(samples), left_out, train_rows, eval_rows)
    counts = train_rows.token_counts(text_config.vocab_size)
    by_count = counts.argsort(descending=True, stable=True)
    vocabulary = by_count[: recipe.draft_vocab].sort().values if recipe.draft_vocab else None
    frequent = by_count[: recipe.frequent]
    frequent = frequent[counts[frequent] > 0]
    if vocabulary is not None:
        frequent = frequent[torch.isin(frequent, vocabulary)]
    drafter = new_drafter(recipe, text_config).to(arguments.device)
    # Weights of a checkpoint take the place of any start.
    start(drafter, replace(recipe, init="random", init_from=None) if last else recipe, target, train_rows)
    if recipe.rate_of_fc == 0:
        for parameter in drafter.fitted_parameters():
            parameter.requires_grad_(False)
    frozen = {"heads": drafter.serial_parameters, "serial": drafter.head_parameters}
    if recipe.phase in frozen:
        for parameter in frozen[recipe.phase]():
            parameter.requires_grad_(False)
    training_model = kind.model(
        drafter, objective_of(recipe, vocabulary), target, frequent, recipe.own_tokens, recipe.bf16
    )
    # Now, of the files that were read: more answers may be appended to them while the run lasts.
    made = made_with(recipe, arguments.world_size)
    callbacks: list[TrainerCallback] = [ExportCallback(recipe, training_model, made)]
    if recipe.save_minutes:
        callbacks.append(TimedCheckpoints(recipe.save_minutes))
    if recipe.patience:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=recipe.patience))
    trainer = DrafterTrainer(
        recipe=recipe,
        model=training_model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        compute_metrics=acceptance_metrics(kinds),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=last)
    metrics = trainer.evaluate()
    tensors = drafter_tensors(training_model)
    if trainer.is_world_process_zero():
        final = Path(recipe.output) / "final"
        export(tensors, training_model, recipe, made, final)
        write_json(final / "metrics.json", metrics)
        trainer.state.save_to_json(str(final / STATE))
    _end_process_group(trainer)
    return metrics


def _end_process_group(trainer: Trainer) -> None:
    """Left to the end of the process, the threads of a process group abort it now and then, though all is done.

    DistributedDataParallel goes before its group: as the last to hold it, it keeps Python's lock while it waits for
    gloo's thread, and that thread may need the lock to let go of its last tensor.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


def check_rows(recipe: Recipe, read: int, left_out: Counter[str], train: PackedRows, held_out: PackedRows) -> None:
    """Say what of the data is left out, and refuse a run without rows to train on or to measure on.

    read: conversations taken from the files.  left_out: others there, by the reason.  Raises: DataError.
    """
    left_out = left_out + Counter({CUT_AWAY: train.cut_away + held_out.cut_away})
    why = f" ({in_words(left_out)})" if left_out else ""
    if left_out:
        logger.warning("training data: %d conversations are taken, left out: %s", read, in_words(left_out))
    for rows, what in ((train, "train on"), (held_out, "measure on")):
        if not len(rows):
            raise DataError(
                f"{', '.join(recipe.data)}: no row is left to {what}, of {read} conversations taken{why}; give more "
                f"conversations, at least two of a kind, or a --row-length above {recipe.row_length}"
            )


def last_checkpoint(output: Path) -> str:
    """The newest whole checkpoint of a run: one that a kill cut off has no trainer state yet.

    Raises: RecipeError when there is none.
    """
    whole = [path.parent for path in output.glob(f"checkpoint-*/{STATE}")]
    if not whole:
        raise RecipeError(f"{output}: no checkpoint to resume from; start without --resume")
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2])))


def _tell_of_other_rows(recipe: Recipe, checkpoint: Path) -> None:
    """Warn where another draw of the held-out conversations may hold out some that the checkpoint was trained on."""
    file = checkpoint / "drafter" / "recipe.json"
    before = read_recipe(file)[0] if file.is_file() else recipe
    for name in ("seed", "held_out"):
        then, now = getattr(before, name), getattr(recipe, name)
        if then != now:
            logger.warning(
                "%s was trained with %s %s, this run has %s: what it is measured on may have been trained on",
                checkpoint, name, then, now,
            )  # fmt: skip


def _arguments(recipe: Recipe) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": recipe.output, "max_steps": recipe.steps, "per_device_train_batch_size": recipe.rows,
        "per_device_eval_batch_size": 1, "learning_rate": recipe.learning_rate, "lr_scheduler_type": "cosine",
        "warmup_steps": int(recipe.warmup_ratio * recipe.steps), "adam_beta1": 0.9, "adam_beta2": 0.95,
        "weight_decay": 0.0, "max_grad_norm": 0.5, "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 20, "eval_strategy": "steps", "eval_steps": recipe.save_every, "save_strategy": "steps",
        "save_steps": recipe.save_every, "save_total_limit": 2, "remove_unused_columns": False,
        "label_names": ["index"], "seed": recipe.seed, "report_to": ["tensorboard"], "dataloader_num_workers": 0,
        "ddp_find_unused_parameters": False,
    }  # fmt: skip
    if recipe.schedule == "stable":
        settings["lr_scheduler_type"] = "constant_with_warmup"
        if recipe.decay_steps:
            settings["lr_scheduler_type"] = "warmup_stable_decay"
            settings["lr_scheduler_kwargs"] = {"num_decay_steps": recipe.decay_steps, "decay_type": "linear"}
    if recipe.patience:
        settings |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": "acceptance_length",
            "greater_is_better": True,
            "restore_callback_states_from_checkpoint": True,
        }
    arguments = TrainingArguments(**(settings | recipe.extra))
    if (visible := arguments.n_gpu) > 1:
        logger.warning("training on one of %d GPUs; accelerate launch or torchrun takes all of them", visible)
        arguments._n_gpu = 1  # Trainer would split each batch among them by nn.DataParallel
    return arguments


def _shuffled(samples: list[Sample], seed: int) -> list[Sample]:
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [samples[i] for i in order]
