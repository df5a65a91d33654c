"""What the pages say holds: links lead somewhere, commands parse, code runs, names are there."""

from __future__ import annotations

import argparse
import ast
import pkgutil
import re
import shlex
import shutil
import unicodedata
from functools import cache
from pathlib import Path

import figures
import pytest
import site_pages
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import simdiff
import simdiff_kernels
from simdiff.cli import main, parser
from simdiff.planning.criteria import CRITERIA
from simdiff.planning.names import ALL_CRITERIA
from simdiff.report.terminal import tables
from support.families import FAMILIES
from support.tiny_models import SHAPE, tiny_checkpoint_files  # noqa: F401
from support.vision_models import VISION_FAMILIES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
WRITTEN_BY_HAND = [
    path for path in sorted(DOCS.glob("*.md")) if path.name not in ("figures.md", "gpu.md")
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
# What the code of a page leaves in the folder in which it runs.
WRITTEN = {
    "README.md": ["pruned"],
    "python.md": ["pruned", "recovered", "scores.json"],
    "scorers.md": [],
}

of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


@cache
def prose(page: Path) -> str:
    """As on the site, without code."""
    text = page.read_text()
    if site_pages.COMMANDS in text:
        text = text.replace(site_pages.COMMANDS, site_pages.command_reference())
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def slugs(heading: str) -> tuple[str, str]:
    """The anchors that GitHub and the site give a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip()
    on_github = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    on_the_site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
    return on_github, on_the_site


def anchors(page: Path) -> set[str]:
    """Those that are the same on GitHub and on the site."""
    text = FENCE.sub("", page.read_text())
    found = map(slugs, re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE))
    return {on_github for on_github, on_the_site in found if on_github == on_the_site}


def links(page: Path) -> list[str]:
    """Relative ones, with their anchors."""
    text = prose(page)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    found += re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
    return [link for link in found if not re.match(r"\w+:", link)]


@of_each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_a_broken_link_is_found() -> None:
    """The checker itself: links of all kinds are seen, anchors differ by what is in headings."""
    assert {"docs/method.md", "docs/report.png", "docs/scorers.md#accuracy"} <= {*links(README)}
    assert "../benchmarks/results/manifest.json" in links(DOCS / "figures.md")
    assert "accuracy" in anchors(DOCS / "scorers.md")
    assert slugs("The paper's `α` = 1") == ("the-papers-α--1", "the-papers-1")


@of_each_page
def test_python_compiles(page: Path) -> None:
    for code in blocks(page, "python"):
        ast.parse(code)


@pytest.mark.model
@pytest.mark.parametrize("name", WRITTEN)
def test_marked_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All marked blocks of a page in order, in one empty folder."""
    marked = runnable(next(page for page in PAGES if page.name == name))
    assert marked
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in marked:
        exec(compile(code, name, "exec"), names)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == WRITTEN[name]


def runnable(page: Path) -> list[str]:
    marked = r"^<!-- run -->\n```python\n(.*?)^```"
    return re.findall(marked, page.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_all_pages_with_marked_code_are_run() -> None:
    assert [page.name for page in PAGES if runnable(page)] == list(WRITTEN)


def commands(page: Path) -> list[list[str]]:
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [rest for first, *rest in filter(None, words) if first == "simdiff"]


@of_each_page
def test_commands_parse(page: Path) -> None:
    for words in commands(page):
        parser().parse_args(words)


# What makes a command small enough for a tiny model.
SMALL = "--num-windows 4 --window-length 16"
QUICK = {
    "score": SMALL,
    "recover": SMALL,
    "eval": SMALL,
    "bench": "--new-tokens 2 --repeats 3 --warm-up 0 --prompt-lengths 4",
}


@pytest.mark.parametrize("page", [README, DOCS / "guide.md"], ids=lambda page: page.name)
def test_commands_run_in_sequence(
    page: Path,
    tiny_checkpoint_files: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As printed, from one model and one text, every output of one the input of the next."""
    shutil.copytree(tiny_checkpoint_files, tmp_path / "my-model")
    torch.manual_seed(7)
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": 12, "intermediate_size": 48})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "my-model")
    words = torch.randint(1, 96, (60, 30)).tolist()
    text = "\n\n".join(" ".join(f"w{number}" for number in row) for row in words)
    (tmp_path / "corpus.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    run = commands(page)
    assert {"score", "plan", "prune", "verify", "recover", "eval"} <= {words[0] for words in run}
    for words in run:
        assert main([*words, *QUICK.get(words[0], "").split()]) == 0, words


def test_every_command_has_its_function() -> None:
    rows = re.findall(
        r"^\| `simdiff (\w+)` \| `([\w.]+)`(?:; .* `([\w.]+)`)? \|$",
        (DOCS / "python.md").read_text(),
        flags=re.MULTILINE,
    )
    assert {command for command, *_ in rows} == {*site_pages.command_parsers()}
    for _, *found in rows:
        for name in filter(None, found):
            assert callable(pkgutil.resolve_name(name)), name


def test_families_are_those_of_the_tests() -> None:
    guide = (DOCS / "guide.md").read_text()
    vision = "vision-language, by the text part"
    for kind, known in (("causal", FAMILIES), (vision, VISION_FAMILIES)):
        (row,) = re.findall(rf"^\| {kind} \| (.*) \|$", guide, flags=re.MULTILINE)
        assert row.replace("`", "").split(", ") == list(known)


def test_every_column_is_explained() -> None:
    named = set(re.findall(r"`([^`\n]+)`", FENCE.sub("", (DOCS / "guide.md").read_text())))
    assert {*tables._COLUMNS, "in draws", "decision"} <= named


def test_commands_are_found() -> None:
    assert len(commands(README)) == 6
    shown = {words[0] for words in commands(DOCS / "commands.md")}
    assert shown == {*site_pages.command_parsers()}


def test_readme_is_short() -> None:
    typed = re.sub(r"<.*?>", "", figures.without_blocks(FENCE.sub("", README.read_text())))
    assert 500 < len(typed.split()) <= 1000


def flags(command: argparse.ArgumentParser) -> set[str]:
    return {flag for action in command._actions for flag in action.option_strings}


# Options of other programs.
OTHERS = {"--check", "--draft-max", "--trust-remote-code", "--prune-layers", "--no-build-isolation"}


@pytest.mark.parametrize("page", [README, *WRITTEN_BY_HAND], ids=lambda page: page.name)
def test_options_that_pages_name_exist(page: Path) -> None:
    known = OTHERS.union(*map(flags, site_pages.command_parsers().values()))
    spans = " ".join(re.findall(r"`([^`\n]*)`", FENCE.sub("", page.read_text())))
    named = re.findall(r"(?<!\S)--[a-z][\w-]*", spans)
    assert {flag for flag in named if flag not in known} == set()


def test_every_option_is_in_the_reference() -> None:
    reference = site_pages.command_reference()
    for name, command in site_pages.command_parsers().items():
        section = reference.partition(f"### simdiff {name}\n")[2].partition("\n### ")[0]
        options = flags(command) - {"-h", "--help", "--help-all"}
        assert {flag for flag in options if f"`{flag}`" not in section} == set(), name


def test_rows_of_the_reference_have_three_cells() -> None:
    rows = [row for row in site_pages.command_reference().splitlines() if row.startswith("|")]
    assert len(rows) > 100
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {5}


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        entries = entry.values() if isinstance(entry, dict) else entry
        return [page for part in entries for page in pages(part)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    written = {path.name for path in DOCS.glob("*.md")} | {*site_pages.PAGES.values()}
    assert sorted(listed) == sorted(written)


def test_every_public_name_is_in_the_reference() -> None:
    toolkit, kernels = ((DOCS / f"{name}.md").read_text() for name in ("api", "api-kernels"))
    for name in simdiff.__all__:
        home = getattr(simdiff, name).__module__
        assert f"::: {home}.{name}\n" in toolkit
    for name in simdiff_kernels.__all__:
        assert f"::: simdiff_kernels.{name}\n" in kernels


def test_criteria_are_those_of_the_code() -> None:
    text = " ".join((DOCS / "method.md").read_text().split())
    for criterion in CRITERIA.values():
        assert f"- `{criterion.name}`: `{criterion.formula}`. Source: {criterion.source}." in text
    assert {name for name in ALL_CRITERIA if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("page", [CONTRIBUTING, *sorted(DOCS.glob("*.md"))], ids=lambda p: p.name)
def test_named_files_exist(page: Path) -> None:
    """Paths in backticks that start in the root of the repository."""
    folders = "python|simdiff_kernels|csrc|benchmarks|tests|tools|docs|examples"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text()):
        assert (ROOT / path).exists(), path
