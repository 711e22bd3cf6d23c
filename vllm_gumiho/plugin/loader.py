"""vLLM model loader for our load format."""

from __future__ import annotations

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from vllm_gumiho.drafters.checkpoints import open_checkpoint


class CheckpointLoader(BaseModelLoader):
    """Reads any format that `vllm_gumiho.drafters.checkpoints` knows, one tensor at a time, strictly."""

    def download_model(self, model_config: ModelConfig) -> None:
        open_checkpoint(model_config.hf_config.gumiho_checkpoint)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        model.load_weights(open_checkpoint(model_config.hf_config.gumiho_checkpoint).tensors())
