"""Command lines out of the documentation, and for each program a rule that checks one without starting an engine.

A rule raises when the line would not be accepted; it never changes a file.  Marks after ```sh (``gpu``, ``hub``,
``nodes``) are for readers: what a line needs to do something.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

from places import ROOT

PROGRAMS = ("python", "make", "pip", "vllm", "vllm-gumiho", "sh", "curl", "ray", "pre-commit", "git", "docker")
ASSIGNMENT = re.compile(r"[A-Z_]+=.*")
# Modules and scripts that say what they take when asked with --help.
WITH_HELP = ("vllm_gumiho.", "examples/", "tests/")


def commands(text: str) -> list[str]:
    """Command lines of fenced ``sh`` blocks and of indented ones, continued lines joined, comments and prompts cut."""
    found: list[str] = []
    fence, info = False, ""
    lines = iter(text.replace("\\\n", " ").splitlines())
    for line in lines:
        if match := re.match(r"\s*```(.*)", line):
            fence, info = not fence, match[1].strip() if not fence else ""
        elif fence and info.split()[:1] in (["sh"], ["bash"], ["console"]):
            found.append(line.strip().removeprefix("$ "))
        elif not fence and line.startswith("    ") and line.split()[:1] and line.split()[0] in PROGRAMS:
            found.append(line.strip())
    return [line for line in found if shlex.split(line, comments=True)]


def check(line: str) -> None:
    """Raises: AssertionError for a command without a rule, and whatever the rule does."""
    words = shlex.split(line, comments=True)
    while words and ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    words = words[: words.index("|")] if "|" in words else words
    if words[0] in ("$", "export", "cd"):
        return
    program = Path(words[0]).name
    assert program in RULES, f"no rule for {program!r}: add one to tests/support/documented.py"
    RULES[program](words[1:])


def _make(words: list[str]) -> None:
    names = [word for word in words if not word.startswith("-") and "=" not in word]
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(names) <= set(targets), f"no such target: {set(names) - set(targets)}"
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _gumiho(words: list[str]) -> None:
    import typer

    from vllm_gumiho.cli import app

    group = typer.main.get_command(app)
    assert words[0] in group.commands, f"no such subcommand: {words[0]}"
    if "--help" not in words:
        with group.commands[words[0]].make_context(words[0], words[1:], resilient_parsing=False):
            pass


def _vllm(words: list[str]) -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if words[:2] == ["bench", "serve"]:
        from vllm.benchmarks.serve import add_cli_args

        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        _parse(parser, words[2:])
        return
    assert words[0] == "serve", f"no rule for vllm {words[0]}"
    from vllm.entrypoints.cli.serve import make_arg_parser

    words = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
    args = _parse(make_arg_parser(FlexibleArgumentParser()), words[1:])
    if args.speculative_config is not None:
        from vllm.config import SpeculativeConfig

        from vllm_gumiho.drafters import PER_REQUEST, SEEDED_TEXT

        ours = {PER_REQUEST, SEEDED_TEXT}
        unknown = set(args.speculative_config) - set(SpeculativeConfig.__dataclass_fields__) - ours
        assert not unknown, f"no such fields of a speculative config: {unknown}"


def _parse(parser, words: list[str]):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser.parse_args(words)
    except SystemExit:
        raise AssertionError(said.getvalue().strip().splitlines()[-1]) from None


def _python(words: list[str]) -> None:
    if words[0] == "-m":
        name, rest = words[1], words[2:]
        if name == "pytest":
            missing = [word for word in rest if word.startswith("tests/") and not (ROOT / word.split("::")[0]).exists()]
            assert not missing, f"no such files: {missing}"
            return
        if name == "pip":
            _pip(rest)
            return
        if name == "torch.distributed.run":
            _python(rest[rest.index("-m") :])
            return
        if name == "vllm_gumiho.cli":
            _gumiho(rest)
            return
        assert importlib.util.find_spec(name), f"no such module: {name}"
        run = runpy.run_module
    else:
        name, rest = words[0], words[1:]
        assert (ROOT / name).is_file(), f"no such script: {name}"
        run = runpy.run_path
    assert name.startswith(WITH_HELP), f"no rule for python {name}"
    taken = set(re.findall(r"--[a-z][a-z0-9-]*", _help(run, name)))
    unknown = {word.partition("=")[0] for word in rest if word.startswith("--")} - taken
    assert not unknown, f"{name} does not take {unknown}; it takes {sorted(taken)}"


def _accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch", f"no rule for accelerate {words[0]}"
    at = words.index("-m")
    _parse(launch_command_parser(), [*words[1:at], "script.py"])
    _python(words[at:])


def _help(run, name: str) -> str:
    argv, said = sys.argv, io.StringIO()
    sys.argv = [name, "--help"]
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            run(name if run is runpy.run_module else str(ROOT / name), run_name="__main__")
    finally:
        sys.argv = argv
    return said.getvalue()


def _sh(words: list[str]) -> None:
    done = subprocess.run(["sh", "-n", words[0]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert words[0] in (ROOT / "Makefile").read_text(), f"{words[0]} is run by no target of the Makefile"


def _curl(words: list[str]) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    (url,) = (word for word in words if word.startswith("http"))
    path = "/" + url.split("/", 3)[3]
    assert path in ("/v1/chat/completions", "/metrics", "/health", "/v1/models"), f"no route {path}"
    if "-d" in words:
        ChatCompletionRequest(**json.loads(words[words.index("-d") + 1]))


def _pip(words: list[str]) -> None:
    assert words[0] == "install"
    extras = importlib.metadata.metadata("vllm-gumiho").get_all("Provides-Extra")
    for word in words[1:]:
        for name in re.findall(r"(?:^\.|vllm-gumiho)\[(.*)\]", word):
            assert set(name.split(",")) <= set(extras), f"no such extras: {name}"


def _pre_commit(words: list[str]) -> None:
    assert words == ["install"]
    assert (ROOT / ".pre-commit-config.yaml").is_file()


def _ray(words: list[str]) -> None:
    """Ray is not installed here: its own command line is only held to what the text of this repository uses."""
    assert words[0] == "start"
    assert {word for word in words if word.startswith("--")} <= {"--head", "--port", "--address"}


RULES = {
    "accelerate": _accelerate,
    "make": _make, "vllm-gumiho": _gumiho, "vllm": _vllm, "python": _python, "python3": _python, "sh": _sh,
    "curl": _curl, "pip": _pip, "pre-commit": _pre_commit, "ray": _ray,
}  # fmt: skip
os.environ.setdefault("COLUMNS", "200")
