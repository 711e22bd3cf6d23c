"""The page docs/configuration.md, which ``python tests/support/reference_page.py`` writes from the code.

Commands and their options are read from the command line itself, variables from `vllm_gumiho.env`.  What a speculative
key means here is said below; a test holds the keys to vLLM's own config and to the code that reads them.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer
from places import ROOT

PAGE = ROOT / "docs" / "configuration.md"
READ, REFUSED, PASSED = "read", "refused", "passed on to vLLM"
SHAPES = "vllm_gumiho.benchmark.shapes"


@dataclass(frozen=True)
class Key:
    """A key of the speculative config.  use: what this package does with it."""

    name: str
    use: str
    what: str


KEYS = (
    Key(
        "method",
        READ,
        '`"gumiho"` or `"moa"`, or left out where `model` is a checkpoint of ours. `"gumiho-layers"` takes layered '
        "heads alone.",
    ),
    Key("model", READ, "Draft checkpoint: a folder, a weight file or a hub name. Without it, the target's known one."),
    Key(
        "num_speculative_tokens",
        READ,
        'K, a whole number from 1 to what the checkpoint drafts, or `"auto"`. Default: all it drafts, 7 for released '
        "heads.",
    ),
    Key(
        "num_speculative_tokens_per_batch_size",
        READ,
        'K by batch size, a list of `[first, last, K]` with K from 0 to `num_speculative_tokens`. Not with `"auto"`.',
    ),
    Key(
        "num_speculative_tokens_per_request",
        READ,
        '`"confident"`: a draft ends where another token is not worth verifying. Or a number: what a row costs, as a '
        "share of a step. Runner V1; turns async scheduling off.",
    ),
    Key(
        "max_model_len",
        READ,
        "Longest text that is drafted for. Leave it out: below the target's, runner V1 drafts for nobody in a step "
        "with a longer request.",
    ),
    Key("revision", READ, "Branch, tag or commit of a checkpoint that is fetched from the hub."),
    Key(
        "draft_sample_method",
        READ,
        '`"greedy"` (default) or `"probabilistic"`. With greedy drafts the Triton kernels are on by default on a GPU.',
    ),
    Key(
        "seeded_text",
        READ,
        '`"same"`: a request with a seed gives the text that it gives without speculation, by [sample and '
        "walk](seeded-text.md), in model runner V2 with greedy drafts. Default: vLLM's own draws.",
    ),
    Key(
        "draft_weights",
        READ,
        "`auto` (default: as the checkpoint is), `bf16` (the engine's dtype), `fp8` or `int8`, "
        "a copy of the LM head included.",
    ),
    Key("draft_load_config", REFUSED, "Gumiho reads its checkpoints itself."),
    Key("parallel_drafting", REFUSED, "Gumiho's heads already draft in parallel."),
    Key("draft_tensor_parallel_size", PASSED, "Ranks of the draft: 1, or as many as the target has."),
    Key(
        "rejection_sample_method",
        READ,
        "How vLLM verifies drafts; `standard` alone goes with `seeded_text`. The benchmark of shapes sets `synthetic`.",
    ),
    Key("synthetic_acceptance_rates", PASSED, "Assumed acceptance by position, for `synthetic`."),
)

# Forms of the same request on vLLM's command line and in Python: how it is written, which keys it gives.
FLAGS = {
    "--speculative-config": "all keys, as one JSON object",
    "--speculative-model": "`model`; `gumiho` alone finds the target's known checkpoint",
    "--spec-model": "the same",
    "--spec-method": "`method`",
    "--spec-tokens": "`num_speculative_tokens`",
}
CALLS = {
    "vllm serve CHECKPOINT": "none: a checkpoint of the speculators format brings its target",
    "LLM(TARGET, speculative_config={...})": "all keys",
    "LLM(TARGET, speculative_model=...)": "`model`, after `import vllm_gumiho`",
}

HEAD = """# Configuration

Every speculative key that is read or refused, every environment variable, every option of every command.
`python tests/support/reference_page.py` writes this page from the code, and `tests/house/test_reference_page.py` holds
it to that.

- [The speculative config](#the-speculative-config)
- [Environment variables](#environment-variables)
"""


def page() -> str:
    """docs/configuration.md as it must be."""
    found = commands()
    contents = []
    for panel in dict.fromkeys(panel for panel, *_ in found):
        of = [(name.removeprefix("vllm-gumiho "), anchor(name)) for at, name, _ in found if at == panel]
        contents += _items([f"{panel}: " + ", ".join(f"[`{name}`](#{place})" for name, place in of)])
    sections = [_speculative(), _variables(), *(_command(name, command) for _, name, command in found)]
    return "\n".join([HEAD + "\n".join(contents), *("\n".join(section) for section in sections)]).rstrip() + "\n"


def commands() -> list[tuple[str, str, Any]]:
    """Panel of ``vllm-gumiho --help``, name and click's command, in their order; then the benchmark of shapes."""
    from vllm_gumiho.benchmark import shapes
    from vllm_gumiho.cli import app

    group: Any = typer.main.get_command(app)
    alone = typer.Typer(add_completion=False)
    alone.command()(shapes.main)
    found = [(command.rich_help_panel, f"vllm-gumiho {name}", command) for name, command in group.commands.items()]
    return [*found, (found[-1][0], SHAPES, typer.main.get_command(alone))]


def anchor(title: str) -> str:
    """Of a heading, as code hosts and the site make it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def old_names(command: Any) -> dict[str, str]:
    """Options that a command still takes under a name they had, to their names now."""
    return dict(inspect.getclosurevars(type(command).parse_args).nonlocals.get("table", {}))


def _items(lines: list[str]) -> list[str]:
    wrap = textwrap.TextWrapper(
        120, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return [wrap.fill(line) for line in lines]


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _speculative() -> Iterator[str]:
    yield from ("", "## The speculative config", "", "A request may be written in any of these forms:", "")
    yield from _items([f"`{form}`: {keys}" for form, keys in (FLAGS | CALLS).items()])
    yield from ("", "Its keys:", "")
    yield from _items([f"`{key.name}` ({key.use}): {key.what}" for key in KEYS])
    yield from ("", "All other keys of vLLM's `SpeculativeConfig` are passed on to vLLM, unread.")


def _variables() -> Iterator[str]:
    from vllm_gumiho.env import OTHERS, OURS

    yield from ("", "## Environment variables")
    for title, variables in (("Of this package:", OURS), ("Of others, read or set here:", OTHERS)):
        yield from ("", title, "")
        yield from _items([f"`{one.name}`: {one.what} Default: {one.default}." for one in variables])


def _command(name: str, command: Any) -> Iterator[str]:
    yield from ("", f"## `{name}`", "")
    yield from (f"Run as `python -m {name}`.", "") if name == SHAPES else ()
    yield _filled(_text(command.help))
    yield ""
    shown = [param for param in command.params if not getattr(param, "hidden", False) and param.name != "help"]
    yield from _items([_argument(param) for param in shown if param.param_type_name == "argument"])
    yield from _items([_option(param) for param in shown if param.param_type_name == "option"])
    if old := old_names(command):
        names = ", ".join(f"`{before}` (now `{now}`)" for before, now in old.items())
        yield from ("", _filled(f"Old names, still taken with a warning: {names}."))


def _argument(param: Any) -> str:
    name = (param.name or "").upper() + (" ..." if param.nargs == -1 else "")
    return f"`{name}`: {_text(param.help)}"


def _option(param: Any) -> str:
    names = " ".join(f"`{name}`" for name in sorted(param.opts, key=lambda name: not name.startswith("--")))
    names += "".join(f" / `{name}`" for name in param.secondary_opts)
    facts = ", ".join(_facts(param))
    help = _text(param.help)
    return names + (f" ({facts})" if facts else "") + (f": {help}" if help else "")


def _facts(param: Any) -> Iterator[str]:
    """Whether an option must be given, its default, whether it repeats."""
    default = None if callable(param.default) else param.default
    if param.required:
        yield "required"
    elif param.is_flag:
        if param.secondary_opts and default is not None:
            yield f"default `{param.opts[0] if default else param.secondary_opts[0]}`"
    elif default not in (None, "") and not param.multiple:
        yield f"default `{default:g}`" if isinstance(default, float) else f"default `{default}`"
    if param.multiple and "repeat" not in _text(param.help):
        yield "may be repeated"


def _text(text: str | None) -> str:
    """On one line, with one space behind a sentence."""
    return " ".join(inspect.cleandoc(text or "").split())


if __name__ == "__main__":
    PAGE.write_text(page())
