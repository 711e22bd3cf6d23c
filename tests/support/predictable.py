"""A tiny target with a predictable next token, a drafter that knows the prediction, and a character tokenizer.

The target's LM head puts `successor(x)` after token x; random layers overrule it now and then.  The drafter passes the
embedding of the token it drafted through, and its heads apply the successor as often as their position asks.  So
drafts are accepted often, at every position, and rejected often enough: what a random drafter cannot show.
"""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path

import tiny
import tiny_moa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, HEADS = 128, 5
BOS, EOS = 0, 1
SPECIAL = ("<s>", "</s>")
CHARACTERS = [chr(i) for i in range(32, 127)] + ["\n"]
VOCAB = len(SPECIAL) + len(CHARACTERS)
# Larger than any input of a SiLU here, so that SiLU(x + SHIFT) is x + SHIFT, which the LM head does not see.
SHIFT = 40.0


def encode(text: str) -> list[int]:
    """Token ids of a text, one a character."""
    return [len(SPECIAL) + CHARACTERS.index(character) for character in text]


def successors(vocab: int) -> list[int]:
    """The token that each token predicts: a permutation.

    Letters come round to an end of sequence; digits, capitals and the rest have rings of their own.
    """
    if vocab != VOCAB:
        return [(token + 1) % vocab for token in range(vocab)]
    letters = [*encode(string.ascii_lowercase + "."), EOS]
    rings = [letters, encode(string.digits), encode(string.ascii_uppercase)]
    used = {token for ring in rings for token in ring}
    rings.append([token for token in range(vocab) if token not in used])
    return [following for _, following in sorted((a, b) for r in rings for a, b in zip(r, r[1:] + r[:1], strict=True))]


def embedding(vocab: int) -> Tensor:
    """Orthonormal rows ``[V, H]``, each orthogonal to the vector of ones.  V < H."""
    random = torch.randn(HIDDEN, vocab + 1, generator=torch.Generator().manual_seed(5))
    random[:, 0] = 1.0
    return torch.linalg.qr(random).Q[:, 1:].T.contiguous()


def write_target(folder: Path, vocab: int = VOCAB, noise: float = 0.3, sharpness: float = 1.0, **changes) -> Path:
    """Target whose layers overrule the successor more often with more ``noise``; ``sharpness`` scales its logits."""
    settings = {"hidden_size": HIDDEN, "intermediate_size": 192, "vocab_size": vocab} | changes
    tiny.write_target(folder, seed=3, **settings)

    weights = load_file(folder / "model.safetensors")
    rows, following = embedding(vocab), torch.tensor(successors(vocab))
    weights["model.embed_tokens.weight"] = rows
    weights["lm_head.weight"] = torch.zeros_like(rows).index_copy(0, following, rows) * sharpness
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= noise / weights[name].std() / HIDDEN**0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def write_checkpoint(folder: Path, vocab: int = VOCAB, config: dict | None = None, noise: float = 3.5) -> Path:
    """Drafter in the released layout: ``fc`` passes the embedding on, head i maps by successors.

    Layers overrule it now and then, so that drafts hang on the KV cache and the features.
    """
    tensors = tiny.drafter_tensors(hidden_size=HIDDEN, vocab_size=vocab)
    rows, following = embedding(vocab), torch.tensor(successors(vocab))
    for name, tensor in tensors.items():
        if name.startswith(("fc.", "mlp.")):
            tensor.zero_()
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor *= noise / tensor.std() / HIDDEN**0.5
    tensors["fc.weight"][:, :HIDDEN] = 8 * torch.eye(HIDDEN)
    reached = torch.arange(vocab)
    for head in range(HEADS):
        tensors[f"mlp.{head}.0.linear.weight"][:, HIDDEN:] = rows[reached].T @ rows
        tensors[f"mlp.{head}.0.linear.bias"].fill_(SHIFT)
        reached = following[reached]
    return tiny.write_released(folder, tensors, config)


def write_layered(folder: Path, vocab: int = VOCAB, noise: float = 3.5, read: float = 2.0) -> Path:
    """As `write_checkpoint`, reading states of the target's layers, which overrule the successor now and then."""
    tensors = load(write_checkpoint(folder, vocab, noise=noise))
    layered = tiny.layered_tensors(layers=(0, 1, 2), hidden_size=HIDDEN, vocab_size=vocab)
    tensors |= {name: tensor for name, tensor in layered.items() if name.startswith(("state_norms.", "combine."))}
    random = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(6))
    tensors["fc.weight"][:, HIDDEN:] = random * read / HIDDEN**0.5
    return tiny.write_released(folder, tensors)


def write_moa(folder: Path, vocab: int = VOCAB, noise: float = 0.0) -> Path:
    """Mixture of Attentions that drafts successors: its attentions pass the embedding on.

    With noise they overrule it now and then, so that drafts hang on both caches and on the features.
    """
    made = tiny_moa.drafter(hidden_size=HIDDEN, layers=(0, 1, 2), vocab_size=vocab)
    tensors = {name: tensor.detach() for name, tensor in made.state_dict().items()}
    for name, tensor in tensors.items():
        if name.startswith(("self_attention.", "cross_attention.")) and name.endswith(
            ("o_proj.weight", "down_proj.weight")
        ):
            tensor *= noise / tensor.std() / HIDDEN**0.5
    made.save(folder, tensors, "org/target", None)
    return folder


def write_eagle(folder: Path, vocab: int = VOCAB) -> Path:
    """An EAGLE head that drafts successors: one layer that adds nothing after a ``fc`` that passes the embedding on."""

    tensors = load(write_checkpoint(folder, noise=0.0))
    (folder / "pytorch_model.bin").unlink()
    own = {name: tensor for name, tensor in tensors.items() if name == "fc.weight" or name.startswith("layers.0.")}
    save_file(own, folder / "model.safetensors")
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "vocab_size": vocab, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(tiny.target_config(**sizes)))
    return folder


def load(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [{" ": "Ġ", "\n": "Ċ"}.get(character, character) for character in CHARACTERS]
    tokens = {name: i for i, name in enumerate([*SPECIAL, *names])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    generation = {"bos_token_id": BOS, "eos_token_id": EOS}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def write_int8(source: Path, folder: Path) -> Path:
    """The target with 8-bit weights a channel and 8-bit activations a token (compressed-tensors)."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].abs().amax(1, keepdim=True) / 127
        weights[name] = (weights[name] / scale).round().to(torch.int8)
        weights[f"{name}_scale"] = scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    integers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": integers | {"strategy": "channel", "dynamic": False},
        "input_activations": integers | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_int4(source: Path, folder: Path, method: str, group: int = 32) -> Path:
    """The target with 4-bit weights, a scale (and with AWQ a zero point) for every ``group`` inputs: gptq or awq."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        rounded, scale = round_to_int4(weights.pop(name), group)
        levels = (rounded + 8).flatten(0, 1).to(torch.int32)
        zeros = torch.full((len(scale), levels.shape[1]), 8, dtype=torch.int32)
        base = name.removesuffix("weight")
        weights[f"{base}scales"] = scale.squeeze(1)
        if method == "gptq":
            # GPTQ stores zero points less one.
            weights[f"{base}qweight"], weights[f"{base}qzeros"] = packed(levels.T).T.contiguous(), packed(zeros - 1)
            weights[f"{base}g_idx"] = torch.arange(len(levels), dtype=torch.int32) // group
        else:
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            weights[f"{base}qweight"], weights[f"{base}qzeros"] = packed(levels, order), packed(zeros, order)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": True, "desc_act": False},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"},
    }[method]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def round_to_int4(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """Integers from -7 to 7, ``[inputs / group, group, outputs]``, and the float16 scale of each group of inputs."""
    groups = weight.T.unflatten(0, (-1, group))
    scale = (groups.abs().amax(1, keepdim=True) / 7).to(torch.float16)
    return (groups / scale).round().clamp(-7, 7), scale


def packed(levels: Tensor, order: list[int] | None = None) -> Tensor:
    """Eight 4-bit values of a row in each int32, the first in the lowest bits: ``[N, M]`` -> ``[N, M / 8]``."""
    eights = levels.unflatten(1, (-1, 8))[:, :, order or list(range(8))].to(torch.int64)
    words = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def write_adapter(folder: Path, seed: int, rank: int = 4, scale: float = 0.1) -> Path:
    """A random LoRA adapter on the target's query and output projections, in PEFT's layout."""
    folder.mkdir(parents=True)
    random, modules = torch.Generator().manual_seed(seed), ["q_proj", "o_proj"]
    tensors = {}
    for name in (f"{layer}.self_attn.{module}" for layer in range(2) for module in modules):
        at = f"base_model.model.model.layers.{name}"
        tensors[f"{at}.lora_A.weight"] = torch.randn(rank, HIDDEN, generator=random) * scale
        tensors[f"{at}.lora_B.weight"] = torch.randn(HIDDEN, rank, generator=random) * scale
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    config |= {"r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
