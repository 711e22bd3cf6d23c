"""From what a user writes to what vLLM understands: one `Request`, made once and passed on.

A request for one of our drafters becomes ``{"method": <vLLM's own>, "model": <folder>, ...}`` where the folder holds
only a config.json, made here from the checkpoint's tensors and the target's config.  The draft architecture in it is
what tells our drafters from vLLM's further down; weights are read from the checkpoint itself.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gumiho.drafters import DRAFTERS, PER_REQUEST, SEEDED_TEXT, Drafter
from vllm_gumiho.drafters.checkpoints import LOAD_FORMAT, Checkpoint, drafter_in, open_checkpoint
from vllm_gumiho.drafters.draft_weights import AUTO as AS_GIVEN
from vllm_gumiho.drafters.draft_weights import KEY, asked_for, choose
from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.request.catalogue import check_named, checkpoint_for, local_path
from vllm_gumiho.request.draft_config import derive_draft_config, publish
from vllm_gumiho.request.kv_groups import tears_drafts_apart
from vllm_gumiho.request.lengths import AUTO, SCHEDULE, TOKENS, check_schedule, draft_length
from vllm_gumiho.request.per_request import CONFIDENT, row_cost
from vllm_gumiho.request.seeded_text import seeded_text
from vllm_gumiho.request.target_check import problem_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig

DUMMY = "dummy"
logger = logging.getLogger("vllm.vllm_gumiho")


@dataclass(frozen=True)
class Request:
    """A speculative config that means one of our drafters, its checkpoint opened, fitted to the target and verified.

    spec: as the user wrote it, keys with underscores.  where: the checkpoint as named, or as found for the target.
    load_format: of the target; ``dummy`` gives the draft dummy weights too.
    """

    spec: dict[str, Any]
    drafter: Drafter
    where: str
    checkpoint: Checkpoint
    draft_config: dict[str, Any]
    load_format: str

    @property
    def is_auto(self) -> bool:
        """Whether the draft length is to be chosen by measurement."""
        return self.spec.get(TOKENS) == AUTO

    @property
    def most(self) -> int:
        """The largest K that the checkpoint drafts."""
        return self.checkpoint.sizes.max_draft_tokens

    def needs_one_kv_group(self, target: ModelConfig) -> bool:
        """Whether the draft layers share KV cache groups only where the target's layers of all kinds are in one."""
        layers = self.draft_config["transformer_layer_config"]["num_hidden_layers"]
        return tears_drafts_apart(target.hf_text_config, layers)

    def with_lengths(self, tokens: int, schedule: list[list[int]] | None = None) -> Request:
        """The same request with a draft length in place of "auto"."""
        lengths = {TOKENS: tokens} | ({} if schedule is None else {SCHEDULE: schedule})
        return replace(self, spec={**self.spec, **lengths})

    @property
    def is_confident(self) -> bool:
        """Whether drafts end by request, by what a row costs on this machine."""
        return self.spec.get(PER_REQUEST) == CONFIDENT

    @property
    def ends_by_request(self) -> bool:
        """Whether drafts end by request, whatever a row is taken to cost."""
        return self.draft_config.get(PER_REQUEST) is not None

    def with_row_cost(self, cost: float) -> Request:
        """The same request with drafts that end where another row is not worth its cost."""
        return replace(self, draft_config={**self.draft_config, PER_REQUEST: cost})

    def for_vllm(self) -> dict[str, Any]:
        """vLLM's speculative config.  Raises: CheckpointError where the draft's config.json can be put nowhere."""
        tokens = draft_length(self.spec.get(TOKENS), self.checkpoint)
        ours = ("revision", PER_REQUEST, SEEDED_TEXT, KEY)
        spec = {key: value for key, value in self.spec.items() if key not in ours}
        spec |= {"method": self.drafter.vllm_method, "model": str(publish(self.draft_config)), TOKENS: tokens}
        if self.load_format != DUMMY:
            from vllm.config import LoadConfig

            spec["draft_load_config"] = LoadConfig(load_format=LOAD_FORMAT)
        logger.info(
            "%s: checkpoint %s (%s), %s; drafting %d tokens a step",
            self.drafter.title,
            self.where,
            self.checkpoint.layout,
            self.checkpoint.sizes.passes(),
            tokens,
        )
        return spec


def in_our_words(spec: dict[str, Any]) -> dict[str, Any]:
    """A user's dict with our words in lower case: the method, the drafter as the model, and ``auto``."""

    def word(key: str, value: Any) -> Any:
        ours = {"method": DRAFTERS, "model": DRAFTERS, TOKENS: (AUTO,)}.get(key, ())
        return value.lower() if isinstance(value, str) and value.lower() in ours else value

    return {key: word(key, value) for key, value in spec.items()}


def asks_for_ours(spec: dict[str, Any]) -> bool:
    """Whether a speculative config, as the user wrote it, means one of our drafters."""
    spec = in_our_words(spec)
    method, model = spec.get("method"), spec.get("model")
    if any(name in DRAFTERS for name in (method, model) if isinstance(name, str)):
        return True
    if not isinstance(model, str):
        return False
    published = (drafter for drafter in DRAFTERS.values() if model.lower().startswith(drafter.hub_prefix))
    found = next(published, None) or drafter_in(model)
    if found is None:
        return False
    return method in (None, found.vllm_method, *(DRAFTERS[name].vllm_method for name in found.also_named))


def resolve(
    spec: dict[str, Any], target: ModelConfig, parallel: ParallelConfig | None = None, load_format: str = "auto"
) -> Request:
    """Everything that a request means, known before an engine starts.

    spec: the user's dict, for which `asks_for_ours` holds; it is not changed.  parallel: None where no engine is to be
    started with it.  load_format: of the target's weights.

    Raises: CheckpointError naming what is wrong with the checkpoint, the target or the values.
    """
    spec = in_our_words(spec)
    if problem := problem_of(target.hf_text_config, target.model):
        raise CheckpointError(problem)
    where, path = _locate(spec, target)
    checkpoint = open_checkpoint(path)
    check_named(where, checkpoint.drafter, spec.get("method"), spec.get("model"))
    _check_features(spec, parallel)
    _check_lengths(spec, checkpoint)
    _tell_of_shorter_drafts(spec, target)
    weights = choose(spec.get(KEY), checkpoint)
    draft_config = derive_draft_config(checkpoint, target, parallel, weights)
    for_runner = {PER_REQUEST: row_cost(spec.get(PER_REQUEST)), SEEDED_TEXT: seeded_text(spec)}
    draft_config |= {key: value for key, value in for_runner.items() if value is not None}
    if spec.get("draft_load_config") is not None:
        raise CheckpointError("draft_load_config is not for Gumiho, which reads its checkpoints itself; leave it out")
    if load_format != DUMMY:
        checkpoint.verify(target.get_vocab_size())
    # What was measured or stored for a request is for these weights, whoever asked for them.
    kept = {key: value for key, value in spec.items() if key != KEY}
    kept |= {} if asked_for(spec.get(KEY)) == AS_GIVEN else {KEY: asked_for(spec.get(KEY))}
    return Request(kept, checkpoint.drafter, where, checkpoint, draft_config, load_format)


def _locate(spec: dict[str, Any], target: ModelConfig) -> tuple[str, Path]:
    """The checkpoint a speculative config means, as named or as found for the target, and its local path."""
    method, model = spec.get("method"), spec.get("model")
    names = [*DRAFTERS, *(drafter.vllm_method for drafter in DRAFTERS.values())]
    if method is not None and method not in names:
        raise CheckpointError(f"model {model!r} goes with method {model!r}, not {method!r}; leave out the method")
    if model is not None and not isinstance(model, str):
        raise CheckpointError(f"speculative model {model!r} is not a path or a hub name")
    where = checkpoint_for(model, target.model, method)
    return where, local_path(where, spec.get("revision"))


def _check_lengths(spec: dict[str, Any], checkpoint: Checkpoint) -> None:
    if spec.get(TOKENS) != AUTO:
        check_schedule(spec.get(SCHEDULE), draft_length(spec.get(TOKENS), checkpoint))
    elif spec.get(SCHEDULE) is not None:
        raise CheckpointError(
            f'{TOKENS} "{AUTO}" and {SCHEDULE} say the same twice; leave one of them out, or give a number with the '
            "schedule"
        )


def _tell_of_shorter_drafts(spec: dict[str, Any], target: ModelConfig) -> None:
    """Model runner V1 drafts for nobody in a step in which one request is longer than the draft's max_model_len."""
    longest = spec.get("max_model_len")
    if isinstance(longest, int) and longest < target.max_model_len:
        logger.warning(
            "max_model_len=%d in the speculative config, the target is served with %d: in model runner V1 a request "
            "longer than that leaves its whole batch without accepted drafts; leave it out",
            longest,
            target.max_model_len,
        )


def _choose_apart(parallel: ParallelConfig) -> str | None:
    """What makes a config of its own in each part of the group, None where one process makes it for all."""
    if parallel.distributed_executor_backend == "external_launcher":
        return "the engines of a launcher"
    if parallel.nnodes > 1:
        return f"{parallel.nnodes} nodes"
    size, local = parallel.data_parallel_size, parallel.data_parallel_size_local
    return f"servers of {local} among {size} ranks" if local < size and parallel.data_parallel_backend == "mp" else None


def _check_features(spec: dict[str, Any], parallel: ParallelConfig | None) -> None:
    if parallel is not None and parallel.pipeline_parallel_size > 1:
        raise CheckpointError(
            f"Gumiho shares the target's embedding and LM head, which pipeline parallelism puts on different workers; "
            f"use pipeline_parallel_size=1 (not {parallel.pipeline_parallel_size}) and tensor parallelism instead"
        )
    if spec.get(TOKENS) == AUTO and parallel is not None and (servers := _choose_apart(parallel)):
        raise CheckpointError(
            f'{TOKENS} "{AUTO}" is chosen by each server, and {servers} of one group could choose apart and wait for '
            "each other for ever; give all of them one number, which vllm-gumiho tune measures"
        )
    if spec.get("parallel_drafting"):
        raise CheckpointError(
            "parallel_drafting is not for Gumiho, whose heads already draft in parallel; leave it out"
        )
