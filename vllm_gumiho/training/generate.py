"""Training data: the target's own answers to prompts, made with vLLM offline."""

from __future__ import annotations

import json
import os
import random
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gumiho.engines.prompts import Prompt, read_prompts, render
from vllm_gumiho.engines.stream import Stream
from vllm_gumiho.env import CPU_KV_SPACE, engine_environment
from vllm_gumiho.errors import DataError, EngineError
from vllm_gumiho.files import check_writable, lines_of, write_text
from vllm_gumiho.training.decontaminate import EvaluationPrompts, normalise

if TYPE_CHECKING:
    from vllm import SamplingParams

SAMPLED_TEMPERATURE = 0.8
# Conversations in the engine for each that it decodes: those waiting take the place of one that ends.
WAITING = 2
# KV cache on a CPU where the user has not chosen: room for a full batch of a small target.
CPU_KV_GIB = "4"
# Of every line that is written.
_BEGINNING = '{"id": '


@dataclass(frozen=True)
class Questions:
    """How prompts become conversations.  sampled: share of conversations answered at T=0.8, chosen by id and seed."""

    max_tokens: int = 256
    max_prompt_tokens: int = 512
    max_turns: int = 1
    sampled: float = 0.3
    seed: int = 0

    @property
    def longest(self) -> int:
        """Most tokens of a conversation when its last question is asked."""
        return self.max_prompt_tokens + (self.max_turns - 1) * self.max_tokens

    def temperature(self, name: str) -> float:
        """Of all answers of the conversation with this id."""
        return SAMPLED_TEMPERATURE if random.Random(f"{self.seed}:{name}").random() < self.sampled else 0.0

    def answer_seed(self, name: str, turn: int) -> int:
        """Seed of a sampled answer, 0 to 2^32 - 1: its own, so that it does not depend on what else is answered."""
        return zlib.crc32(f"{self.seed}:{name}:{turn}".encode())


@dataclass
class Conversation:
    """A conversation under way: token ids so far, and the turns to be written.

    lost: why it ended before its last question, a key of the counts; None where it did not.
    """

    id: str
    questions: list[str]
    messages: list[dict[str, str]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    turns: list[dict[str, list[int]]] = field(default_factory=list)
    lost: str | None = None

    def ask(self, tokenizer: Any, longest: int) -> list[int] | None:
        """Token ids up to the next answer; None when there is no next question or it does not fit.

        The template is applied to the whole conversation.  Where that does not begin with the ids so far (an answer
        that its own text does not tokenise back to), the conversation ends: training sees only ids the target saw.
        """
        if len(self.turns) == len(self.questions):
            return None
        messages = [*self.messages, {"role": "user", "content": self.questions[len(self.turns)]}]
        ids = render(tokenizer, messages)
        if ids[: len(self.ids)] != self.ids:
            self.lost = "cut_by_template"
            return None
        if len(ids) > longest:
            self.lost = "cut_by_length" if self.turns else "too_long"
            return None
        self.messages = messages
        return ids

    def hear(self, tokenizer: Any, prompt: list[int], answer: list[int]) -> None:
        """Take the target's answer to what `ask` gave."""
        self.turns.append({"prompt": prompt[len(self.ids) :], "answer": answer})
        self.ids = prompt + answer
        text = tokenizer.decode(answer, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})


def read_questions(files: list[Path], shard: tuple[int, int] = (0, 1)) -> tuple[list[Prompt], int]:
    """The prompts of one shard, and how many of all were left out as repeats; see `distinct` and `of_shard`."""
    prompts, repeats = distinct(prompt for file in files for _, prompt in read_prompts(file))
    return of_shard(prompts, shard), repeats


def distinct(prompts: Iterable[Prompt]) -> tuple[list[Prompt], int]:
    """The first prompt of each id and of each first turn (letters and digits alone), and how many others there are."""
    kept: dict[str, Prompt] = {}
    seen: set[str] = set()
    repeats = 0
    for prompt in prompts:
        key = normalise(prompt.turns[0])
        if prompt.id in kept or key in seen:
            repeats += 1
            continue
        seen.add(key)
        kept[prompt.id] = prompt
    return list(kept.values()), repeats


def of_shard(prompts: Iterable[Prompt], shard: tuple[int, int]) -> list[Prompt]:
    """Those of shard ``(i, n)``.  Their ids decide, so that shards never overlap whatever the order of the files."""
    index, count = shard
    return [prompt for prompt in prompts if zlib.crc32(prompt.id.encode()) % count == index]


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
    """Append a line ``{"id", "target", "temperature", "turns"}`` a conversation to ``output``; ids it has are skipped.

    A conversation is written as it ends, and the next one takes its place in the engine's batch at once.  A run that
    was stopped, limited or split in shards draws what the whole run draws, but where batches of other sizes round a
    close choice otherwise (bfloat16 does now and then).

    Returns counts: conversations and answer tokens written, prompts that were too long, conversations that ended before
    their last question as it did not fit or as the template writes earlier turns in other tokens, repeats, and prompts
    checked against the evaluation prompts.  A line is whole or not there: a last line cut off by a kill is taken away.

    Raises: PromptError for a prompt file that cannot be read, DataError for prompts that are evaluation prompts,
    EngineError where vLLM does not start.
    """
    from rich.progress import Progress
    from vllm import LLM
    from vllm.platforms import current_platform

    refuse_output(output, prompt_files)
    prompts, repeats = read_questions(prompt_files, shard)
    counts = {"conversations": 0, "answer_tokens": 0, "too_long": 0, "cut_by_length": 0, "cut_by_template": 0}
    counts |= {"repeats": repeats, "checked": 0}
    if evaluation_prompts:
        evaluation = EvaluationPrompts.read(evaluation_prompts)
        counts["checked"] = evaluation.refuse((prompt.id, turn) for prompt in prompts for turn in prompt.turns)
    known = known_ids(output, Path(target).name)
    todo = [prompt for prompt in prompts if prompt.id not in known][: limit or None]
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"max_num_seqs": 96, "max_model_len": questions.longest + questions.max_tokens, **engine}
    os.environ.setdefault(CPU_KV_SPACE.name, CPU_KV_GIB)
    os.environ.update(engine_environment())
    if current_platform.is_cpu():
        # vLLM 0.32's CPU build fails with a seeded prompt in chunks.  Without chunks a step takes whole prompts alone.
        settings.setdefault("enable_chunked_prefill", False)
    try:
        llm = LLM(model=target, **settings)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise EngineError(f"{target}: its engine did not start: {reason}; vLLM's log above has the cause") from error
    talks = (Conversation(prompt.id, list(prompt.turns[: questions.max_turns])) for prompt in todo)
    with output.open("a") as file, Progress() as progress:
        task = progress.add_task("answers", total=len(todo))
        for talk in finished(llm, talks, questions, WAITING * settings["max_num_seqs"]):
            progress.advance(task)
            if talk.lost is not None:
                counts[talk.lost] += 1
            if not talk.turns:
                continue
            record = {"id": talk.id, "target": Path(target).name, "temperature": questions.temperature(talk.id)}
            record["turns"] = talk.turns
            file.write(json.dumps(record) + "\n")
            file.flush()
            counts["conversations"] += 1
            counts["answer_tokens"] += sum(len(turn["answer"]) for turn in talk.turns)
    return counts


def finished(llm: Any, talks: Iterator[Conversation], questions: Questions, at_once: int) -> Iterator[Conversation]:
    """Conversations as they end, ``at_once`` of them in the engine or waiting there, so that its batch is full."""
    tokenizer, stream = llm.get_tokenizer(), Stream(llm.llm_engine)

    def ask(talk: Conversation) -> bool:
        ids = talk.ask(tokenizer, questions.longest)
        if ids is not None:
            stream.send((talk, ids), ids, _sampling(questions, talk.id, len(talk.turns)))
        return ids is not None

    while True:
        while len(stream) < at_once and (talk := next(talks, None)) is not None:
            if not ask(talk):
                yield talk
        if not stream:
            return
        for (talk, ids), output in stream.step():
            if output.finished:
                talk.hear(tokenizer, ids, list(output.outputs[0].token_ids))
                if not ask(talk):
                    yield talk


def _sampling(questions: Questions, name: str, turn: int) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    temperature = questions.temperature(name)
    seed = questions.answer_seed(name, turn) if temperature else None
    return SamplingParams(
        temperature=temperature,
        max_tokens=questions.max_tokens,
        seed=seed,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def known_ids(output: Path, target: str) -> set[str]:
    """Ids of the lines of a file of answers; a last line that a kill cut off is taken away.

    target: its name, which lines have; those that were written before they had one are taken for its answers.

    Raises: DataError for a file of anything else or of another target's answers, which stays as it is.
    """
    if not output.is_file():
        return set()
    text = output.read_text()
    whole = text[: text.rfind("\n") + 1]
    rest = text[len(whole) :]
    ids: set[str] = set()
    targets = {target}

    def take(line: str) -> None:
        record = json.loads(line)
        ids.add(_id_of(record))
        targets.add(str(record.get("target", target)))

    try:
        for _, line in lines_of(whole):
            take(line)
        if rest and not _is_cut_off(rest):
            take(rest)
            whole = f"{text}\n"
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{output}: holds a line that is no answer ({error!r}); give another --output") from error
    if others := targets - {target}:
        raise DataError(f"{output}: holds answers of {', '.join(sorted(others))}, not {target}; give another --output")
    if whole != text:
        write_text(output, whole)
    return ids


def _is_cut_off(line: str) -> bool:
    """Whether a line begins as ours do and does not end."""
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return _BEGINNING.startswith(line[: len(_BEGINNING)])
    return False


def _id_of(record: Any) -> str:
    """Raises: ValueError, KeyError or TypeError for a record that is no answer's."""
    for turn in record["turns"]:
        turn["prompt"], turn["answer"]
    return str(record["id"])


def refuse_output(output: Path, prompt_files: Iterable[Path]) -> None:
    """Raises: DataError for an output that is one of the prompt files; OutputError for one that cannot be written."""
    if any(file.exists() and output.exists() and file.samefile(output) for file in prompt_files):
        raise DataError(f"{output}: holds the prompts, and the answers would follow them; give another --output")
    check_writable(output)
