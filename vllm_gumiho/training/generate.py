"""Training data: the target's own answers to prompts, made with vLLM offline."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_gumiho.training.data import DataError

SAMPLED_TEMPERATURE = 0.8
CHUNK = 192


def generate_answers(
    target: str,
    prompt_files: list[Path],
    output: Path,
    max_tokens: int,
    max_prompt_tokens: int,
    sampled: float,
    limit: int = 0,
    **engine: Any,
) -> int:
    """Append one line ``{id, temperature, prompt, answer}`` (token ids) a prompt to ``output``; known ids are skipped.

    prompt_files: JSON lines of ``{"id", "turns": [user turn, ...]}``; the first turn is asked.  sampled: share of
    prompts answered at T=0.8, chosen by the prompt's id.  Returns the number of answer tokens written.

    Raises: DataError for a prompt file that cannot be read.
    """
    from rich.progress import Progress
    from vllm import LLM, SamplingParams

    prompts = [prompt for file in prompt_files for prompt in _read_prompts(file)]
    known = _known_ids(output)
    todo = [prompt for prompt in prompts if prompt["id"] not in known][: limit or None]
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"max_num_seqs": 96, "max_model_len": max_prompt_tokens + max_tokens, **engine}
    llm = LLM(model=target, **settings)
    tokenizer = llm.get_tokenizer()
    written = 0
    with output.open("a") as file, Progress() as progress:
        task = progress.add_task("answers", total=len(todo))
        for start in range(0, len(todo), CHUNK):
            asked = []
            for prompt in todo[start : start + CHUNK]:
                ids = list(
                    tokenizer.apply_chat_template(
                        [{"role": "user", "content": prompt["turns"][0]}], add_generation_prompt=True, return_dict=False
                    )
                )
                if len(ids) <= max_prompt_tokens:
                    hot = random.Random(prompt["id"]).random() < sampled
                    asked.append((prompt["id"], ids, SAMPLED_TEMPERATURE if hot else 0.0))
            outputs = llm.generate(
                [{"prompt_token_ids": ids} for _, ids, _ in asked],
                [SamplingParams(temperature=t, max_tokens=max_tokens) for _, _, t in asked],
                use_tqdm=False,
            )
            for (name, ids, temperature), out in zip(asked, outputs, strict=True):
                answer = list(out.outputs[0].token_ids)
                written += len(answer)
                record = {"id": name, "temperature": temperature, "prompt": ids, "answer": answer}
                file.write(json.dumps(record) + "\n")
            file.flush()
            progress.advance(task, CHUNK)
    return written


def _read_prompts(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        raise DataError(f"{file}: no such file of prompts")
    for number, line in enumerate(file.read_text().split("\n"), 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            yield {"id": str(raw["id"]), "turns": [str(raw["turns"][0])]}
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f'{file}:{number}: not a prompt ({error!r}); expected {{"id", "turns"}}') from error


def _known_ids(output: Path) -> set[str]:
    if not output.is_file():
        return set()
    return {json.loads(line)["id"] for line in output.read_text().split("\n") if line.strip()}
