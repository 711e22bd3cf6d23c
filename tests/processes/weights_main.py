"""Acceptance with each ``draft_weights``, by the plain equations over greedy answers.

``python tests/processes/weights_main.py --target FOLDER --checkpoint FOLDER --prompts FOLDER --limit 80 --output FILE``

Greedy verification accepts a draft's tokens up to the first that is not the answer's own.  The answers are the target's
greedy ones, made once by transformers; every setting then drafts after each of their tokens, and what an engine would
have accepted is read off.  Exact but for the last draft of an answer, which an engine cuts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from many_gumiho import ManyDrafts, plain_target, reference_of

from vllm_gumiho.drafters.draft_weights import DraftWeights

CPU_PARTS = frozenset({"linear", "heads"})
SETTINGS: dict[str, tuple[DraftWeights, frozenset[str], int]] = {
    "bf16": (DraftWeights(), frozenset(), 0),
    "fp8": (DraftWeights("fp8", "fp8"), frozenset(), 0),
    "fp8, best 8 re-scored": (DraftWeights("fp8", "fp8"), frozenset(), 8),
    "int8, wide inputs (GPU)": (DraftWeights("int8", "int8"), frozenset(), 0),
    "int8, rounded inputs (CPU)": (DraftWeights("int8", "int8"), CPU_PARTS | {"lm_head"}, 0),
    "int8, rounded inputs, re-scored": (DraftWeights("int8", "int8"), CPU_PARTS | {"lm_head"}, 8),
    "int8, LM head as the target has it (CPU)": (DraftWeights("int8"), CPU_PARTS, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("target", "checkpoint", "prompts", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=80)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(args.target), plain_target(args.target)
    drafters = {
        name: (reference_of(args.target, args.checkpoint, weights, rounded), kept)
        for name, (weights, rounded, kept) in SETTINGS.items()
    }
    wide = drafters["bf16"][0].lm_head
    found: dict[str, dict] = {}
    for place in range(args.limit):  # a prompt of each set in turn, so that a part of the run is a sample of all
        for file in sorted(args.prompts.glob("*.jsonl")):
            lines = file.read_text().splitlines()
            if place >= len(lines):
                continue
            chat = [{"role": "user", "content": json.loads(lines[place])["turns"][0]}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)[-960:]
            with torch.inference_mode():
                text = answer(model, prompt, args.max_tokens, tokenizer.eos_token_id)
                features = model.model(text[None, :-1]).last_hidden_state[0]
                for name, (drafter, kept) in drafters.items():
                    counts = accepted(drafter, text, features, len(prompt), wide if kept else None, kept)
                    one = found.setdefault(name, {}).setdefault(file.stem, {"drafts": 0, "accepted": 0, "first": 0})
                    one["drafts"] += len(counts)
                    one["accepted"] += sum(counts)
                    one["first"] += sum(count > 0 for count in counts)
        args.output.write_text(json.dumps({"prompts of a set": place + 1, "settings": summary(found)}, indent=1))


def summary(found: dict[str, dict]) -> dict[str, dict]:
    """Acceptance length of each set and their mean, and the share accepted at the first position."""
    result = {}
    for name, sets in found.items():
        lengths = {key: 1 + one["accepted"] / one["drafts"] for key, one in sets.items()}
        drafts = sum(one["drafts"] for one in sets.values())
        result[name] = {
            "length": sum(lengths.values()) / len(lengths),
            "first": sum(one["first"] for one in sets.values()) / drafts,
            "drafts": drafts,
            "lengths": lengths,
        }
    return result


def answer(model, prompt: list[int], most: int, end: int) -> Tensor:
    """The prompt and its greedy answer, up to the end token."""
    tokens = torch.tensor([prompt])
    found = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=most, do_sample=False, pad_token_id=end
    )
    return found[0]


def accepted(
    drafter: ManyDrafts, text: Tensor, features: Tensor, prompt: int, wide: Tensor | None, kept: int
) -> list[int]:
    """Accepted tokens of each draft that an engine would make, the first of which follows the answer's first token."""
    lengths = torch.arange(prompt + 1, len(text))
    if not len(lengths):
        return []
    drafted = drafts(drafter, text, features, lengths, wide, kept)
    counts, at = [], 0
    while at < len(lengths):
        rest = text[prompt + 1 + at : prompt + 1 + at + drafted.shape[1]]
        right = drafted[at, : len(rest)] == rest
        counts.append(int(right.long().cumprod(0).sum()))
        at += counts[-1] + 1
    return counts


def drafts(
    drafter: ManyDrafts, text: Tensor, features: Tensor, lengths: Tensor, wide: Tensor | None, kept: int
) -> Tensor:
    """``[D, K]``: what is drafted after the first ``lengths`` tokens of a text."""

    def likeliest(states: Tensor) -> Tensor:
        logits = drafter.head_logits(states)
        if not kept:
            return logits.argmax(-1)
        best = logits.topk(kept, dim=-1).indices
        return best.gather(-1, (wide[best] @ states[..., None])[..., 0].argmax(-1, keepdim=True))[..., 0]

    tokens: list[Tensor] = []
    for step in range(drafter.num_serial_steps):
        padded = torch.stack([*tokens, *[torch.zeros_like(lengths)] * (1)], dim=1)
        tokens.append(likeliest(drafter.states(text, features, lengths, padded)[:, step]))
    heads = len({name.split(".")[1] for name in drafter.weights if name.startswith("mlp.")})
    padded = torch.stack([*tokens, *[torch.zeros_like(lengths)] * heads], dim=1)
    last = drafter.states(text, features, lengths, padded)[:, drafter.num_serial_steps :]
    return torch.cat((torch.stack(tokens, dim=1), likeliest(last)), dim=1)


if __name__ == "__main__":
    main()
