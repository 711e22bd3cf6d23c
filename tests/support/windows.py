"""Heads for a target with sliding windows and for its twin without: ``python tests/support/windows.py OUT.json``.

Twins have the same random weights; the window is 16 tokens, of sequences of 96.  Each is trained for on its own
answers, by one recipe, and measured on held-out ones of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import zoo
from runs import recipe
from transformers import AutoModelForCausalLM

WINDOW, SEEDS = 16, 3
PROMPT, ANSWER, CONVERSATIONS = 12, 84, 160
TWINS = {"sliding window": WINDOW, "full attention": None}
SETTINGS = {
    "steps": 300, "save_every": 300, "rows": 4, "row_length": 96, "eval_rows": 40, "held_out": 0.25,
    "candidates": 0, "frequent": 0, "learning_rate": 1e-3,
}  # fmt: skip


def answers(target: Path, seed: int) -> Path:
    """The target's own, sampled cold: neither cycles nor noise."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    draws = torch.Generator().manual_seed(100 + seed)
    prompts = torch.randint(2, zoo.VOCAB, (CONVERSATIONS, PROMPT), generator=draws)
    torch.manual_seed(seed)
    length = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "eos_token_id": None, "pad_token_id": 0}
    sampling = {"do_sample": True, "temperature": 0.25, "top_k": 0}
    found = model.generate(prompts, attention_mask=torch.ones_like(prompts), **length, **sampling)
    rows = [{"id": str(i), "prompt": r[:PROMPT].tolist(), "answer": r[PROMPT:].tolist()} for i, r in enumerate(found)]
    file = target.parent / f"{target.name}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def main(output: Path) -> None:
    from vllm_gumiho.training.trainer import train

    found: dict[str, list[float]] = {name: [] for name in TWINS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(SEEDS):
            for name, window in TWINS.items():
                kind = zoo.Kind("mistral", {"sliding_window": window})
                target = zoo.write(Path(folder) / f"{name} {seed}", kind, seed)
                metrics = train(recipe(target, answers(target, seed), f"{folder}/run {name} {seed}", **SETTINGS))
                found[name].append(round(metrics["eval_acceptance_length"], 3))
                print(name, seed, found[name][-1], flush=True)
    output.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
