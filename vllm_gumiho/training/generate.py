"""Training data: the target's own answers to prompts, made with vLLM offline."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gumiho.training.decontaminate import EvaluationPrompts, normalise
from vllm_gumiho.training.errors import DataError

if TYPE_CHECKING:
    from vllm import SamplingParams

SAMPLED_TEMPERATURE = 0.8
CHUNK = 192


@dataclass(frozen=True)
class Questions:
    """How prompts become conversations.  sampled: share of conversations answered at T=0.8, chosen by id and seed."""

    max_tokens: int = 256
    max_prompt_tokens: int = 512
    max_turns: int = 1
    sampled: float = 0.3
    seed: int = 0

    def temperature(self, name: str) -> float:
        """Of all answers of the conversation with this id."""
        return SAMPLED_TEMPERATURE if random.Random(f"{self.seed}:{name}").random() < self.sampled else 0.0

    def answer_seed(self, name: str, turn: int) -> int:
        """Seed of a sampled answer, 0 to 2^32 - 1: its own, so that it does not depend on what else is answered."""
        return zlib.crc32(f"{self.seed}:{name}:{turn}".encode())


@dataclass
class Conversation:
    """A conversation under way: token ids so far, and the turns to be written."""

    id: str
    questions: list[str]
    messages: list[dict[str, str]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    turns: list[dict[str, list[int]]] = field(default_factory=list)

    def ask(self, tokenizer: Any, longest: int) -> list[int] | None:
        """Token ids up to the next answer; None when there is no next question or it does not fit.

        The template is applied to the whole conversation.  Where that does not begin with the ids so far (an answer
        that its own text does not tokenise back to), the conversation ends: training sees only ids the target saw.
        """
        if len(self.turns) == len(self.questions):
            return None
        messages = [*self.messages, {"role": "user", "content": self.questions[len(self.turns)]}]
        ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        if len(ids) > longest or ids[: len(self.ids)] != self.ids:
            return None
        self.messages = messages
        return ids

    def hear(self, tokenizer: Any, prompt: list[int], answer: list[int]) -> None:
        self.turns.append({"prompt": prompt[len(self.ids) :], "answer": answer})
        self.ids = prompt + answer
        text = tokenizer.decode(answer, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})


def read_prompts(files: list[Path], shard: tuple[int, int] = (0, 1)) -> tuple[list[tuple[str, list[str]]], int]:
    """``(id, user turns)`` of the prompts of one shard, and how many were left out as repeats.

    Of prompts with the same id or the same first turn (letters and digits alone) the first is kept.  A prompt belongs
    to shard ``i`` of ``n`` by its id, so that shards never overlap whatever the order of the files.
    """
    prompts: dict[str, list[str]] = {}
    seen: set[str] = set()
    repeats = 0
    for name, turns in (prompt for file in files for prompt in _read(file)):
        key = normalise(turns[0])
        if name in prompts or key in seen:
            repeats += 1
            continue
        seen.add(key)
        prompts[name] = turns
    index, count = shard
    return [(name, turns) for name, turns in prompts.items() if zlib.crc32(name.encode()) % count == index], repeats


def generate_answers(
    target: str,
    prompt_files: list[Path],
    output: Path,
    questions: Questions,
    evaluation_prompts: list[Path] | None = None,
    shard: tuple[int, int] = (0, 1),
    limit: int = 0,
    **engine: Any,
) -> dict[str, int]:
    """Append one line ``{"id", "temperature", "turns"}`` a conversation to ``output``; ids it has are skipped.

    A run that was stopped, limited or split in shards draws what the whole run draws, but where batches of other
    sizes round a close choice otherwise (bfloat16 does now and then).

    Returns counts: conversations and answer tokens written, prompts that were too long, repeats, and prompts checked
    against the evaluation prompts.  A line is whole or not there: a last line cut off by a kill is taken away.

    Raises: DataError for a prompt file that cannot be read, or prompts that are evaluation prompts.
    """
    from rich.progress import Progress
    from vllm import LLM

    prompts, repeats = read_prompts(prompt_files, shard)
    counts = {"conversations": 0, "answer_tokens": 0, "too_long": 0, "repeats": repeats, "checked": 0}
    if evaluation_prompts:
        evaluation = EvaluationPrompts.read(evaluation_prompts)
        counts["checked"] = evaluation.refuse((name, turn) for name, turns in prompts for turn in turns)
    known = _known_ids(output)
    todo = [(name, turns[: questions.max_turns]) for name, turns in prompts if name not in known][: limit or None]
    output.parent.mkdir(parents=True, exist_ok=True)
    longest = questions.max_prompt_tokens + (questions.max_turns - 1) * questions.max_tokens
    # vLLM 0.32's CPU build fails with a seeded prompt in chunks.  Without chunks a step takes whole prompts alone.
    settings = {"max_num_seqs": 96, "max_model_len": longest + questions.max_tokens, "enable_chunked_prefill": False}
    llm = LLM(model=target, **(settings | engine))
    tokenizer = llm.get_tokenizer()
    with output.open("a") as file, Progress() as progress:
        task = progress.add_task("answers", total=len(todo))
        for start in range(0, len(todo), CHUNK):
            talks = [Conversation(name, turns) for name, turns in todo[start : start + CHUNK]]
            for turn in range(questions.max_turns):
                asked = [(talk, ids) for talk in talks if (ids := talk.ask(tokenizer, longest)) is not None]
                if not asked:
                    break
                outputs = llm.generate(
                    [{"prompt_token_ids": ids} for _, ids in asked],
                    [_sampling(questions, talk.id, turn) for talk, _ in asked],
                    use_tqdm=False,
                )
                for (talk, ids), out in zip(asked, outputs, strict=True):
                    talk.hear(tokenizer, ids, list(out.outputs[0].token_ids))
            for talk in talks:
                if not talk.turns:
                    counts["too_long"] += 1
                    continue
                record = {"id": talk.id, "temperature": questions.temperature(talk.id), "turns": talk.turns}
                file.write(json.dumps(record) + "\n")
                counts["conversations"] += 1
                counts["answer_tokens"] += sum(len(turn["answer"]) for turn in talk.turns)
            file.flush()
            progress.advance(task, len(talks))
    return counts


def _sampling(questions: Questions, name: str, turn: int) -> SamplingParams:
    from vllm import SamplingParams

    temperature = questions.temperature(name)
    seed = questions.answer_seed(name, turn) if temperature else None
    return SamplingParams(temperature=temperature, max_tokens=questions.max_tokens, seed=seed)


def _read(file: Path) -> Iterator[tuple[str, list[str]]]:
    if not file.is_file():
        raise DataError(f"{file}: no such file of prompts")
    for number, line in enumerate(file.read_text().split("\n"), 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            turns = [str(turn) for turn in raw["turns"]]
            yield str(raw["id"]), [turns[0], *turns[1:]]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f'{file}:{number}: not a prompt ({error!r}); expected {{"id", "turns"}}') from error


def _known_ids(output: Path) -> set[str]:
    if not output.is_file():
        return set()
    text = output.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        output.write_text(whole)
    try:
        return {str(json.loads(line)["id"]) for line in whole.split("\n") if line.strip()}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{output}: holds a line that is no answer ({error!r}); give another --output") from error
