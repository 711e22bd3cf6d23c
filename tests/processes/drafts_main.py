"""Records what the engine drafts: ``python drafts_main.py TARGET CHECKPOINT PROMPT OUT.pt``.

Each record is one drafting step of the one request: verified tokens so far, the target's features of all but the
last, and the engine's draft tokens and the features they came from.
"""

from __future__ import annotations

import sys

import torch
from engine_main import prepare


def main() -> None:
    target, checkpoint, prompt, out = sys.argv[1:]
    prepare("v1")
    from vllm import LLM, SamplingParams

    from vllm_gumiho.runners.v1 import GumihoProposer

    records: list[dict] = []
    features: dict[int, torch.Tensor] = {}
    tokens: dict[int, int] = {}
    propose = GumihoProposer.propose

    def recording(self, *args, **kwargs):
        heads = []
        head_features = self.model.head_features
        self.model.head_features = lambda *a: heads.append(head_features(*a)) or heads[-1]
        ids, positions = kwargs["target_token_ids"], kwargs["target_positions"]
        last = kwargs["token_indices_to_sample"]
        last = len(ids) - 1 if last is None else int(last[0])
        for row in range(last + 1):
            features[int(positions[row])] = kwargs["target_hidden_states"][row].clone()
            tokens[int(positions[row])] = int(ids[row])
        end = int(positions[last]) + 1
        tokens[end] = int(kwargs["next_token_ids"][0])
        drafted = propose(self, *args, **kwargs)
        del self.model.head_features
        records.append(
            {
                "tokens": [tokens[i] for i in range(end + 1)],
                "features": torch.stack([features[i] for i in range(end)]),
                "drafted": drafted[0].tolist(),
                "draft_features": torch.stack([*(h[0] for h in self._hidden), *heads[0]]),
            }
        )
        return drafted

    GumihoProposer.propose = recording
    llm = LLM(
        target,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        # Wide: what 8-bit weights round is another test's.
        speculative_config={"method": "gumiho", "model": checkpoint, "draft_weights": "bf16"},
    )
    records.clear()
    llm.chat([{"role": "user", "content": prompt}], SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    torch.save(records, out)


if __name__ == "__main__":
    main()
