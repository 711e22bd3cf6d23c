"""vLLM model loader for our load format."""

from __future__ import annotations

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from vllm_gumiho.drafters.checkpoints import open_checkpoint
from vllm_gumiho.drafters.draft_weights import DraftWeights


class CheckpointLoader(BaseModelLoader):
    """Reads any format that `vllm_gumiho.drafters.checkpoints` knows, one tensor at a time, strictly."""

    def download_model(self, model_config: ModelConfig) -> None:
        open_checkpoint(model_config.hf_config.gumiho_checkpoint)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        config = model_config.hf_config
        opened, dtype = open_checkpoint(config.gumiho_checkpoint), DraftWeights.of(config).dtype
        model.load_weights(opened.tensors() if dtype is None else opened.rows(dtype))
