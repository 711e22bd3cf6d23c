"""What the demonstration shows: both engines' answers side by side as they grow, then tables, then words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from vllm_gumiho.engines.counters import ratio
from vllm_gumiho.engines.prompts import QUESTIONS

if TYPE_CHECKING:
    from typing_extensions import Self

_SHOWN = 700


@dataclass
class Run:
    """What an engine wrote at one concurrency: ``tokens`` and ``texts`` by question."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    passes: int = 0
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def written(self) -> int:
        return sum(map(len, self.tokens.values()))

    @property
    def speed(self) -> float:
        """Output tokens/s, prompts included."""
        return ratio(self.written, self.seconds)

    def add(self, found: dict[str, Any]) -> None:
        self.tokens |= {int(number): tokens for number, tokens in found["tokens"].items()}
        self.texts |= {int(number): text for number, text in found["texts"].items()}
        self.seconds += found["seconds"]
        self.passes += found["passes"]


class Picture:
    """A live table with a column for each engine; a line a question where the output is no terminal."""

    def __init__(self, console: Console, names: list[str], at_once: int):
        self.console, self.names, self.at_once = console, names, at_once
        self.found: dict[str, dict[str, Any]] = {}
        self.numbers: list[int] = []
        self.live = Live(console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def show(self, name: str, numbers: list[int], found: dict[str, Any]) -> None:
        """What an engine has written by now: `demo.tasks.Chat.advance`'s answer."""
        if numbers != self.numbers:
            self.numbers, self.found = numbers, {}
        self.found[name] = found
        if self.console.is_terminal:
            self.live.update(self._table())
        elif not found["left"]:
            asked = f"question {numbers[0] + 1}" + (f" to {numbers[-1] + 1}" if len(numbers) > 1 else "")
            written = sum(map(len, found["tokens"].values()))
            self.console.print(f"{asked} of {len(QUESTIONS)}, {name}: {written} tokens in {found['seconds']:.1f} s")

    def _table(self) -> Table:
        asked = "\n".join(QUESTIONS[number] for number in self.numbers)
        table = Table(title=f"{self.at_once} at a time, question {self.numbers[-1] + 1} of {len(QUESTIONS)}\n{asked}")
        cells = []
        for name in self.names:
            found = self.found.get(name, {"texts": {}, "tokens": {}, "seconds": 0.0})
            written = sum(map(len, found["tokens"].values()))
            speed = f": {written / found['seconds']:.1f} tokens/s" if found["seconds"] else ""
            table.add_column(name + speed, ratio=1)
            room = _SHOWN // len(self.numbers)
            cells.append("\n\n".join(found["texts"].get(str(number), "")[-room:] for number in self.numbers))
        table.add_row(*cells)
        return table


def answers(off: Run, on: Run) -> Table:
    """The answers with Gumiho, and whether the other engine wrote the same tokens."""
    texts = Table("prompt", "answer", "equal", title="Greedy answers", show_lines=True)
    for number, question in enumerate(QUESTIONS):
        same = off.tokens[number] == on.tokens[number]
        texts.add_row(question, on.texts[number].strip()[:200], "[green]yes" if same else "[red]no")
    return texts


def speeds(report: dict[str, Any]) -> Table:
    """A column for each number of questions at a time."""
    rounds = report["rounds"]
    title = f"vLLM {report['vllm_version']}, model runner {report['model_runner']}"
    facts = Table("", *(f"{at_once} at a time" for at_once in rounds), title=title)
    for label, form in (
        ("tokens/s, speculation off", "{tokens_per_s_off:.1f}"),
        ("tokens/s, Gumiho", "{tokens_per_s_on:.1f}"),
        ("speedup", "{speedup:.2f}x"),
        ("tokens a pass of the target", "{tokens_per_pass:.2f}"),
        ("draft tokens sent, accepted", "{sent}, {accepted}"),
    ):
        facts.add_row(label, *(form.format(**figures) for figures in rounds.values()))
    facts.add_row("texts equal", *[str(report["outputs_equal"])] * len(rounds))
    return facts


def in_words(report: dict[str, Any]) -> str:
    """How much faster, at which load, and why not more."""
    rounds = report["rounds"]
    loads = [f"{figures['speedup']:.2f}x as fast with {at_once} at a time" for at_once, figures in rounds.items()]
    sent, accepted = (sum(figures[name] for figures in rounds.values()) for name in ("sent", "accepted"))
    share = f" Of the draft tokens that were checked {accepted / sent:.0%} were right." if sent else ""
    speedups = [figures["speedup"] for figures in rounds.values()]
    if max(speedups) < 1.02:
        why = " This target is so small that checking drafts costs about what they save."
    elif speedups[-1] < speedups[0]:
        why = " With more questions at a time the machine has less idle compute to check drafts with."
    else:
        why = ""
    texts = "the same texts" if report["outputs_equal"] else "OTHER TEXTS (see above)"
    return f"With Gumiho: {texts}, {' and '.join(loads)}.{share}{why}"
