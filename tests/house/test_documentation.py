"""Documentation holds: its commands are taken, its links lead somewhere, its pages are short of breath and complete.

Every command line is read out of the text and given to its program.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import feature_list
import pytest
import reference_page
from documented import ROOT, check, commands

DOCS = ROOT / "docs"
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("**/*.md"))]
PAGES = [*WRITTEN, *sorted((ROOT / "examples").glob("**/*.md"))]
LINES = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page.read_text())]
# Written by a program, from notes of its own.
GENERATED = {feature_list.PAGE, reference_page.PAGE}


@pytest.fixture(scope="module", autouse=True)
def plugins():
    from vllm.plugins import load_general_plugins

    load_general_plugins()


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line}"[:90] for page, line in LINES])
def test_a_documented_command_is_accepted(page, line, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    check(line)
    assert "is now" not in capfd.readouterr().err, "an option has another name now"


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


def test_an_old_name_of_an_option_is_told_of(monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    check("vllm-gumiho tune --target TARGET --max-batch 2")
    assert "is now --concurrency" in capfd.readouterr().err


def test_commands_are_read_out_of_fences_and_indented_blocks():
    text = "\n".join(
        [
            "a",
            "```bash",
            "make a  # why",
            "# only a comment",
            "vllm serve X \\",
            "  --port 1",
            "```",
            "",
            "    python -m m",
            "    z = W m",
            "```python",
            "make b",
            "```",
            "```sh gpu",
            "$ sh c.sh",
            "```",
        ]
    )
    assert commands(text) == ["make a  # why", "vllm serve X    --port 1", "python -m m", "sh c.sh"]


def test_make_targets_named_in_the_prose_exist():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text())}
    assert named
    assert named <= targets


def links(page: Path) -> Iterator[str]:
    """Local ones, an anchor behind ``#`` and all."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            yield link


def test_local_links_lead_somewhere():
    found = [(page, link) for page in PAGES for link in links(page)]
    assert found
    places = [(page, link.partition("#")[0]) for page, link in found]
    assert [f"{page.name}: {link}" for page, link in places if link and not (page.parent / link).exists()] == []


def test_anchors_of_links_are_headings():
    found = [(page, *link.partition("#")) for page in PAGES for link in links(page) if "#" in link]
    assert found
    lost = []
    for page, place, _, anchor in found:
        target = (page.parent / place).resolve() if place else page
        titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", target.read_text(), flags=re.M | re.S), re.M)
        if anchor not in map(reference_page.anchor, titles):
            lost.append(f"{page.name}: {place}#{anchor}")
    assert lost == []


def test_every_example_is_run_by_make_examples_and_says_what_it_shows():
    makefile = (ROOT / "Makefile").read_text()
    scripts = [path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".sh")]
    assert len(scripts) >= 5
    for script in scripts:
        assert f"examples/{script.name}" in makefile
        assert "Shows: " in script.read_text()[:200]


def test_the_readme_is_read_in_a_minute():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 90
    assert [line for line in lines if len(line) > 120] == []


def cells(text: str) -> Iterator[str]:
    """Cells of every table outside of code blocks; of a link its text alone."""
    for line in re.sub(r"^```.*?^```", "", text, flags=re.M | re.S).splitlines():
        if line.startswith("|"):
            yield from re.split(r"(?<!\\)\|", re.sub(r"\]\([^)]*\)", "]", line).strip().strip("|"))


@pytest.mark.parametrize("page", [page for page in WRITTEN if page not in GENERATED], ids=lambda page: page.name)
def test_no_cell_of_a_table_is_over_15_words(page):
    assert [cell for cell in cells(page.read_text()) if len(cell.split()) > 15] == []


def test_cells_are_read_out_of_tables():
    text = "| a b | [c](d e) |\n|---|---|\n```\n| not this |\n```\n| `x \\| y` | z |"
    assert [cell.split() for cell in cells(text)][:2] == [["a", "b"], ["[c]"]]
    assert "not this" not in "".join(cells(text))
    assert len(list(cells(text))) == 6


def test_every_page_is_reached_from_the_index():
    seen, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        targets = (Path(page.parent, link.partition("#")[0]).resolve() for link in links(page))
        waiting += [target for target in targets if target.suffix == ".md" and target.is_relative_to(DOCS)]
    assert sorted(DOCS.glob("**/*.md")) == sorted(seen)


def test_every_page_is_in_the_sites_navigation():
    named = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.glob("**/*.md"))


def test_every_picture_and_record_is_shown_on_a_page():
    shown = {(page.parent / link).resolve() for page in WRITTEN for link in links(page)}
    assert {file for file in (DOCS / "results").iterdir() if file.suffix != ".md"} <= shown


@pytest.mark.parametrize("page", sorted(DOCS.glob("**/*.md")), ids=lambda page: page.name)
def test_the_site_reads_a_page_as_code_hosts_do(page):
    """Its Markdown knows no second word behind a fence, and begins a list or table behind a blank line only."""
    lines = page.read_text().splitlines()
    assert [line for line in lines if re.match(r"\s*```\S+ ", line)] == []
    code, wrong = False, []
    for before, line in zip(["", *lines], lines, strict=False):
        code ^= line.startswith("```")
        for begin in ("- ", "|", "1. "):
            if not code and line.startswith(begin) and before.strip() and not before.startswith((begin, "  ")):
                wrong.append(line)
    assert wrong == []


def test_links_out_of_the_pages_are_links_or_text_in_the_site():
    spec = importlib.util.spec_from_file_location("site_links", DOCS / "site_links.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    text = "[a](../setup.py), [`b`](../tests/house), [c](index.md#x), [d](../no_such.py), [e](https://f.g)"
    page = DOCS / "index.md"
    assert site.rewritten(text, page, DOCS, None) == "a, `b`, [c](index.md#x), [d](../no_such.py), [e](https://f.g)"
    linked = site.rewritten(text, page, DOCS, "https://code/us/").split(", ")
    assert linked[:2] == ["[a](https://code/us/blob/main/setup.py)", "[`b`](https://code/us/tree/main/tests/house)"]
    assert linked[2:] == text.split(", ")[2:]


def said(node: ast.AST) -> str:
    """A text of the source, with … for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%(?:\.\d)?[sdf]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(said, node.values))
    return "…"


def messages() -> Iterator[tuple[str, bool]]:
    """Texts of the package and the kernels, and whether one is that of an error or a line of the log."""
    for file in (*(ROOT / "vllm_gumiho").rglob("*.py"), *(ROOT / "kernels" / "parallel_heads").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Constant, ast.JoinedStr)):
                yield said(node), False
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args or file.parents[1].name == "kernels":
                continue
            name = ast.unparse(call.func)
            # OSErrors are made for our own messages, which name them in brackets.
            if name.startswith("logger.") or (node is not call and not is_oserror(name)):
                yield said(call.args[0]), True


def is_oserror(name: str) -> bool:
    kind = getattr(builtins, name, None)
    return isinstance(kind, type) and issubclass(kind, OSError)


def quoted(page: str) -> set[tuple[str, bool]]:
    """Words of ours on the page, and whether they stand in the first cell of a table headed "words", or in a list."""
    found, table = set(), False
    for line in page.splitlines():
        table = line.startswith("|") and (table or line.startswith("| words |"))
        first = line.split(" | ")[0] if table else line if line.startswith(("- ", "  ")) else ""
        found |= {(words, table) for words in re.findall(r"`([^`]+)`", first)}
    return found


def test_troubleshooting_names_every_message_and_no_other():
    words = quoted((DOCS / "troubleshooting.md").read_text())
    assert len(words) > 150
    found = list(messages())
    texts = {text for text, _ in found}
    assert [one for one, table in words if table and not any(one in text for text in texts)] == []
    asked = {text for text, is_message in found if is_message and re.search("[a-z]", text)}
    assert len(asked) > 150
    assert [text for text in sorted(asked) if not any(one in text for one, _ in words)] == []
