"""A tiny random target with its drafters, written to a folder, and what their references draft for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_gumiho.drafters.gumiho import GUMIHO, LAYERED_GUMIHO
from vllm_gumiho.drafters.gumiho.reference import ReferenceDrafter
from vllm_gumiho.drafters.gumiho.trainable import GumihoDrafter, LayeredGumihoDrafter
from vllm_gumiho.drafters.moa import MOA
from vllm_gumiho.drafters.moa.reference import ReferenceMoa
from vllm_gumiho.drafters.moa.trainable import MoaDrafter
from vllm_gumiho.files import write_json

HIDDEN, VOCAB, HEAD_DIM, HEADS, KEY_HEADS, THETA, EPS = 64, 160, 32, 4, 2, 10000.0, 1e-5
# Whose states drafters read: the second is the target's last, before its final norm.
LAYERS = (1, 2)
# How much drafters pass embeddings on, and how far layers of theirs and of the target overrule what is passed on.
PASSED_ON, ADDED, OVERRULES = 4.0, 0.02, 0.05
_ADDS = ("o_proj.weight", "down_proj.weight")
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


def write_models(folder: Path) -> dict[str, str]:
    """Folders of the target and, by name, of its drafters, with weights that give logits which are far apart.

    Gumiho's is in the released layout, the others' in that of speculators.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folders = {name: folder / name for name in ("target", GUMIHO.name, LAYERED_GUMIHO.name, MOA.name)}
    for one in folders.values():
        one.mkdir(parents=True, exist_ok=True)
    target = folders["target"]
    write_json(target / "config.json", _CONFIG)
    config = AutoConfig.from_pretrained(target)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        gumiho = GumihoDrafter(GumihoDrafter.config_for(config, 2, 2, 5))
        layered = LayeredGumihoDrafter(LayeredGumihoDrafter.config_for(config, 2, 2, 5, LAYERS))
        moa = MoaDrafter(MoaDrafter.config_for(config, LAYERS))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=OVERRULES if name.endswith(_ADDS) else 0.08)
        # Token x is followed by x + 1 unless layers overrule it: drafts that pass embeddings on are right now and then.
        rows = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=-1)
        model.model.embed_tokens.weight.copy_(rows)
        model.lm_head.weight.copy_(rows.roll(1, 0))
        for drafter in (gumiho, layered):
            drafter.init_weights(1.0, 1.0)
            drafter.fc.bias.normal_(std=0.1)
            drafter.fc.weight[:, :HIDDEN] += PASSED_ON * torch.eye(HIDDEN)
        for parameter in layered.combine.parameters():
            parameter.normal_(std=0.1)
        # An untrained one hardly hangs on its features.
        for name, parameter in moa.named_parameters():
            adds = name.endswith(_ADDS) and not name.startswith("layer_")
            parameter.normal_(1.0, 0.2) if parameter.ndim == 1 else parameter.normal_(std=ADDED if adds else 0.15)
    model.save_pretrained(target)
    torch.save(_tensors(gumiho), folders[GUMIHO.name] / _RELEASED)
    for entry, drafter in ((LAYERED_GUMIHO, layered), (MOA, moa)):
        drafter.save(folders[entry.name], _tensors(drafter), str(target), None)
    return {name: str(one) for name, one in folders.items()}


_RELEASED, _OURS = "pytorch_model.bin", "model.safetensors"


def _tensors(drafter: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in drafter.state_dict().items()}


class Reference:
    """Target and drafter in plain torch on the CPU, in float32: states by transformers, drafts by the equations."""

    def __init__(self, models: dict[str, str], name: str = GUMIHO.name):
        """models: of `write_models`.  name: the drafter's."""
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(models["target"], dtype=torch.float32)
        self.name, self.target = name, model.model.eval()
        self.lm_head: Tensor = model.lm_head.weight.detach()
        folder = Path(models[name])
        released = folder / _RELEASED
        weights = torch.load(released, weights_only=True) if released.exists() else load_file(folder / _OURS)
        sizes: dict[str, Any] = {
            "num_heads": HEADS,
            "num_kv_heads": KEY_HEADS,
            "head_dim": HEAD_DIM,
            "rope_theta": THETA,
            "eps": EPS,
        }
        sizes |= {"weights": weights, "embed": model.model.embed_tokens.weight.detach(), "lm_head": self.lm_head}
        self.drafter: ReferenceDrafter | ReferenceMoa
        if name == MOA.name:
            layer: dict[str, Any] = {
                "layer_heads": HEADS,
                "layer_kv_heads": KEY_HEADS,
                "layer_head_dim": HEAD_DIM,
                "layers": LAYERS,
            }
            self.drafter = ReferenceMoa(**sizes, **layer)
        else:
            self.drafter = ReferenceDrafter(**sizes)

    @torch.inference_mode()
    def draft(self, text: list[int], length: int) -> tuple[list[int], Any]:
        """At most ``length`` draft tokens after a verified text, and what each was drafted from, ``[length, H]``."""
        tokens = torch.tensor(text)
        last: list[Tensor] = []
        hook = self.target.layers[-1].register_forward_hook(lambda _module, _given, out: last.append(out))
        found = self.target(tokens[None, :-1], output_hidden_states=True)
        hook.remove()
        features = found.last_hidden_state[0]
        state = last[0][0] if isinstance(last[0], tuple) else last[0]
        held = torch.stack([*(found.hidden_states[i][0] for i in LAYERS[:-1]), state.view_as(features)], dim=1)
        if isinstance(self.drafter, ReferenceMoa):
            return self.drafter.draft(tokens, held, length)
        if self.name == LAYERED_GUMIHO.name:
            features = self.drafter.first_features(held)
        drafted, hidden = self.drafter.draft(tokens, features)
        return drafted[:length], hidden

    @torch.inference_mode()
    def compare(self, text: list[int], drafted: list[int]) -> str:
        """``equal``, ``tie`` or ``wrong`` for the draft of a verified text.

        A tie: where they part first, the logits of both tokens are within a hundredth of the largest one's size, which
        a GPU's rounding of float32 products may decide otherwise.
        """
        expected, hidden = self.draft(text, len(drafted))
        for position, (ours, right) in enumerate(zip(drafted, expected, strict=True)):
            if ours != right:
                logits = self.lm_head @ hidden[position]
                close = logits[right] - logits[ours] <= 0.01 * logits.abs().max()
                return "tie" if close else "wrong"
        return "equal"
