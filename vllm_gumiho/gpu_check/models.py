"""A tiny random target with its drafter, written to a folder, and what the reference drafts for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_gumiho.drafters.gumiho.reference import ReferenceDrafter
from vllm_gumiho.drafters.gumiho.trainable import GumihoDrafter
from vllm_gumiho.drafters.trainable_layers import DrafterConfig
from vllm_gumiho.files import write_json

HIDDEN, VOCAB, HEAD_DIM, HEADS, KEY_HEADS, THETA, EPS = 64, 160, 32, 4, 2, 10000.0, 1e-5
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": EPS,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


def write_pair(folder: Path) -> dict[str, str]:
    """Folders of the target and the drafter, with weights that give logits which are far apart."""
    from transformers import AutoConfig, AutoModelForCausalLM

    target, checkpoint = folder / "target", folder / "drafter"
    for one in (target, checkpoint):
        one.mkdir(parents=True, exist_ok=True)
    write_json(target / "config.json", _CONFIG)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target), dtype=torch.float32)
        drafter = GumihoDrafter(
            DrafterConfig(
                hidden_size=HIDDEN,
                intermediate_size=48,
                num_attention_heads=HEADS,
                num_key_value_heads=KEY_HEADS,
                head_dim=HEAD_DIM,
                rope_theta=THETA,
                rms_norm_eps=EPS,
                vocab_size=VOCAB,
            )
        )
        drafter.init_weights(1.0, 1.0)
        with torch.no_grad():
            drafter.fc.bias.normal_(std=0.1)
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.08)
    model.save_pretrained(target)
    torch.save({name: t.detach().contiguous() for name, t in drafter.state_dict().items()}, checkpoint / _WEIGHTS)
    return {"target": str(target), "checkpoint": str(checkpoint)}


_WEIGHTS = "pytorch_model.bin"


class Reference:
    """Target and drafter in plain torch on the CPU, in float32: features by transformers, drafts by the equations."""

    def __init__(self, pair: dict[str, str]):
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(pair["target"], dtype=torch.float32)
        self.target = model.model.eval()
        self.lm_head: Tensor = model.lm_head.weight.detach()
        self.drafter = ReferenceDrafter(
            weights=torch.load(Path(pair["checkpoint"]) / _WEIGHTS, weights_only=True),
            embed=model.model.embed_tokens.weight.detach(),
            lm_head=self.lm_head,
            num_heads=HEADS,
            num_kv_heads=KEY_HEADS,
            head_dim=HEAD_DIM,
            rope_theta=THETA,
            eps=EPS,
        )

    @torch.inference_mode()
    def compare(self, text: list[int], drafted: list[int]) -> str:
        """``equal``, ``tie`` or ``wrong`` for the draft of a verified text.

        A tie: where they part first, the logits of both tokens are within a hundredth of the largest one's size, which
        a GPU's rounding of float32 products may decide otherwise.
        """
        tokens = torch.tensor(text)
        features = self.target(tokens[None, :-1]).last_hidden_state[0]
        expected, hidden = self.drafter.draft(tokens, features)
        for position, (ours, right) in enumerate(zip(drafted, expected, strict=False)):
            if ours != right:
                logits = self.lm_head @ hidden[position]
                close = logits[right] - logits[ours] <= 0.01 * logits.abs().max()
                return "tie" if close else "wrong"
        return "equal"
