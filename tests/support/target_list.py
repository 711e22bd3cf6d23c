"""The page of targets, docs/targets.md, which ``python tests/support/target_list.py`` writes from the tests' record.

The record is made by ``pytest tests/runners/test_zoo.py --record docs/results/targets.json``: of each kind of the zoo,
what has passed.
"""

from __future__ import annotations

import json

import zoo
from places import ROOT

PAGE = ROOT / "docs" / "targets.md"
RECORD = ROOT / "docs" / "results" / "targets.json"

# What else there is to know of a kind.
NOTES = {
    "gemma2": "logits by the embedding, with a soft cap",
    "gemma3 in turn": "its windows save no KV cache beside the draft",
    "cohere2": "vLLM's windows are a token wider than transformers'",
    "minicpm3": "the LM head reads scaled features; latent attention",
    "padded vocabulary": "more rows than tokens in use",
    "one token more": "a vocabulary of odd size",
    "qwen2_vl": "features and labels tested; vLLM wants torchvision, not there",
    "gpt2": "found under other names than vLLM's EAGLE looks for",
    "opt": "found under other names than vLLM's EAGLE looks for",
    "phi": "the LM head has a bias",
    "granite": "logits are scaled",
    "gpt_oss": "attention with sinks",
}

HEAD = """# Targets

Each kind below was run as a tiny random model with {layers}, on vLLM {version} ({date}).
A head is trained for it for two steps, and an engine serves that head at K = 7, 3 and 1. The text must be the text
without speculation, and every draft token what the equations give. The engine's features must be those that training
takes, within 1e-4. Prompts are longer than every window. The columns name the model runners in which that passed; V2
has been run for a few kinds alone.

```sh
vllm-gumiho check TARGET   # by the target's config alone: can it be served and trained for, which checkpoint fits
```

| kind | transformers' name | trained for | served | note |
|---|---|---|---|---|
"""

TAIL = """
A kind that is not named has not been run. It is taken all the same where vLLM and transformers have it as a causal
language model, and `check` says so.

## What is the target's own

- **Features** are what the target's LM head reads, by the model's own masks: sequences of a packed row see neither one
  another nor past their windows.
- **Labels** are the target's logits: the LM head, its bias, its scale, its soft cap. They are read from the model's own
  code. A target whose logits have another form is refused.
- **Draft layers** attend to the whole text, whatever the target's windows are.
- [test_targets](../tests/training/test_targets.py) compares features and labels with the plain forward pass of each
  kind, at four windows' length, packed with others.

A head for a target with windows learns as one for its twin without them ([comparison](results/windows.md)).

## Limits

- Encoder-decoders, and targets whose embedding has another width than their features, are refused before weights load.
- Targets of text and images draft from text: drafts do not see the images of a prompt. Heads are trained on text, and
  data with placeholders of images is refused.
- Runner V1 takes draft layers in one KV cache group. Where vLLM would tear them apart, its hybrid KV cache manager is
  turned off for that engine, and the log says so.
- Rope types whose frequencies follow the length (`dynamic`, `longrope`): transformers decides by the sequence, vLLM by
  `max_model_len`. Features differ where these do.

`pytest tests/runners/test_zoo.py --record docs/results/targets.json` runs the table anew
([record](results/targets.json)), and `python tests/support/target_list.py` writes this page.
"""


def shown() -> dict[str, set[str]]:
    """What the record has of each kind: ``trained``, ``V1``, ``V2``."""
    found: dict[str, set[str]] = {}
    for entry in json.loads(RECORD.read_text())["files"].values():
        for name, what in entry.get("targets", ()):
            found.setdefault(name, set()).add(what)
    return found


def page() -> str:
    """docs/targets.md as it must be."""
    record, passed, lines = json.loads(RECORD.read_text()), shown(), []
    for name, kind in zoo.ZOO.items():
        has = passed.get(name, set())
        trained = "yes" if "trained" in has else "not run"
        served = ", ".join(runner for runner in ("V1", "V2") if runner in has) or "not run"
        lines.append(f"| {name} | `{kind.model_type}` | {trained} | {served} | {NOTES.get(name, '')} |")
    head = HEAD.format(layers="2 to 6 layers", version=record["versions"]["vllm"], date=record["date"])
    return head + "\n".join(lines) + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(page())
