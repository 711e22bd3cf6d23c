"""Every command line of the documentation, read out of its text, is one that its program takes."""

from __future__ import annotations

import re

import pytest
from documented import ROOT, check, commands

PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md")),
    *sorted((ROOT / "examples").glob("**/*.md")),
]  # fmt: skip
LINES = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page.read_text())]


@pytest.fixture(scope="module", autouse=True)
def plugins():
    from vllm.plugins import load_general_plugins

    load_general_plugins()


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line}"[:90] for page, line in LINES])
def test_a_documented_command_is_accepted(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    check(line)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("frobnicate --all", "no rule"),
        ("make no-such-target", "no such target"),
        ("vllm-gumiho no-such-command", "no such subcommand"),
        ("vllm-gumiho inspect CHECKPOINT --no-such-option", "No such option"),
        ("vllm serve TARGET --no-such-option", "no-such-option"),
        ('vllm serve TARGET --speculative-config \'{"methd": "gumiho"}\'', "methd"),
        ("vllm bench serve --no-such-option", "no-such-option"),
        ("python examples/llama3_8b.py.old", "no such script"),
        ("python -m vllm_gumiho.benchmark.shapes --no-such-option", "does not take"),
        ("accelerate launch --no-such-option -m vllm_gumiho.cli train", "no-such-option"),
        ("pip install '.[no-such-extra]'", "no such extras"),
        ("VARIABLE=1 sh examples/no_such.sh", "no_such.sh"),
    ],
)
def test_a_wrong_command_is_refused(line, reason, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception, match=reason):
        check(line)


def test_commands_are_read_out_of_fences_and_indented_blocks():
    text = "\n".join(
        ["a", "```bash", "make a  # why", "# only a comment", "vllm serve X \\", "  --port 1", "```", "",
         "    python -m m", "    z = W m", "```python", "make b", "```", "```sh gpu", "$ sh c.sh", "```"]
    )  # fmt: skip
    assert commands(text) == ["make a  # why", "vllm serve X    --port 1", "python -m m", "sh c.sh"]


def test_make_targets_named_in_the_prose_exist():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text())}
    assert named
    assert named <= targets


def test_local_links_lead_somewhere():
    links = [
        (page, link)
        for page in PAGES
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
        if "://" not in link
    ]
    assert links
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []


def test_every_example_is_run_by_make_examples_and_says_what_it_shows():
    makefile = (ROOT / "Makefile").read_text()
    scripts = [path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".sh")]
    assert len(scripts) >= 5
    for script in scripts:
        assert f"examples/{script.name}" in makefile
        assert "Shows: " in script.read_text()[:200]
