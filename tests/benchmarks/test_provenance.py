"""Every committed result says which code made it: today's, or docs/figures.md says it is older."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import provenance
import pytest

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = provenance.read_manifest()
RESULTS: dict[str, dict[str, object]] = MANIFEST["results"]
PAGE = " ".join((ROOT / "docs" / "figures.md").read_text().split())
FIELDS = ("command", "date", "machine", "commit", "clean", "sources")


def test_every_result_is_in_the_manifest() -> None:
    files = {path.name: path for path in provenance.RESULTS.iterdir()}
    del files[provenance.MANIFEST.name]
    assert {name: entry["sha256"] for name, entry in RESULTS.items()} == {
        name: provenance.file_digest(path) for name, path in files.items()
    }


@pytest.mark.parametrize("name", RESULTS)
def test_an_entry_says_where_the_result_comes_from(name: str) -> None:
    entry = RESULTS[name]
    assert [field for field in FIELDS if field not in entry] == []
    assert entry["sources"], "it must say what was measured"
    assert entry["command"]
    assert ("epyc-2-cores" in name) <= (entry["machine"] == "AMD EPYC, 2 cores")


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_of_todays_code_or_shown_as_older(name: str) -> None:
    entry = RESULTS[name]
    assert isinstance(entry["sources"], dict)
    older = [
        group
        for group, measured in entry["sources"].items()
        if not provenance.is_current(group, measured, MANIFEST["statements"])
    ]
    words = entry.get("shown_as")
    if words is None:
        assert older == [], f"the code has changed since {name}: measure again, state, or show it"
    else:
        assert str(words) in PAGE.partition("Older than that code")[2].partition(".")[0], (
            f"docs/figures.md must say {words!r} of {name}: python benchmarks/figures.py"
        )


def test_statements_have_a_reason() -> None:
    for statement in MANIFEST["statements"]:
        assert sorted(statement) == ["because", "from", "sources", "to"]
        assert statement["sources"] in provenance.SOURCES
        assert len(statement["because"]) > 20


@pytest.mark.parametrize("name", provenance.SOURCES)
def test_every_group_of_sources_has_files(name: str) -> None:
    assert len(provenance.digest(name)) == 16


def digest(suffix: str, *sources: str) -> str:
    return provenance.digest_of({f"{n}{suffix}": text for n, text in enumerate(sources)})


PYTHON = 'import a\n\n\ndef f(x):\n    """Doc."""\n    return x + 1  # one\n'
CPP = "#pragma once\n#include <a>\n// Why.\nint f(int x) {\n  return x + 1;\n}\n"


def test_what_does_not_run_is_not_in_a_digest() -> None:
    same = "from b import (\n  c,\n)\n# why\ndef f(x):\n  '''Other.\n\n  More.'''\n  return x + 1  # one\n"  # noqa: E501
    assert digest(".py", same) == digest(".py", PYTHON)
    long = "def f(\n    x,\n):  # fmt: skip\n    return x + 1\n"
    assert digest(".py", long) == digest(".py", PYTHON)
    assert digest(".py", PYTHON.replace("return x", "'# why'; return x")) != digest(".py", PYTHON)
    assert digest(".py", PYTHON.replace("+ 1", "+ 2")) != digest(".py", PYTHON)
    assert digest(".py", PYTHON.replace("return x", "assert x")) != digest(".py", PYTHON)
    text = PYTHON + '\nTEXT = """import a"""\n'  # a string that is used is no docstring
    assert digest(".py", text.replace("import a", "")) != digest(".py", text)
    same = "#include <b>\n#include <c>\n  // Else.\nint f(int x)\n{ return x + 1; }\n"
    assert digest(".h", same) == digest(".h", CPP)
    assert digest(".h", CPP.replace("x + 1", "x - 1")) != digest(".h", CPP)
    assert digest(".h", CPP + "#define A 1\n") != digest(".h", CPP)


def test_names_and_order_of_files_are_not_in_a_digest() -> None:
    assert digest(".h", CPP, "int a;") == digest(".h", "int a;", CPP)
    assert digest(".h", CPP, "int a;") != digest(".h", CPP)
    assert digest(".h", CPP, CPP) != digest(".h", CPP)


def test_statements_lead_from_digest_to_digest() -> None:
    def link(before: str, after: str, sources: str = "speed") -> dict[str, str]:
        return {"sources": sources, "from": before, "to": after, "because": "a name"}

    def current(measured: str, *links: dict[str, str]) -> bool:
        return provenance.is_current("speed", measured, iter(links), today=lambda name: "d")

    assert current("d")
    assert not current("a")
    assert current("a", link("c", "d"), link("b", "c"), link("a", "b"))
    assert not current("a", link("b", "c"), link("a", "b"))
    assert not current("a", link("a", "d", "planning"))
    assert not current("a", link("d", "a"))  # what was measured before is not what came after
    assert not current("a", link("a", "b"), link("b", "a"))


def test_a_command_names_no_place_of_a_machine(tmp_path: Path) -> None:
    words = [
        "--output",
        ROOT / "benchmarks" / "results" / "a.csv",
        tmp_path / "x y",
        f"--directory={tmp_path}",
        "--layers",
        "2",
        "demo",
    ]
    assert provenance.command_line("benchmarks/a.py", map(str, words)) == (
        f"benchmarks/a.py --output benchmarks/results/a.csv 'x y' --directory={tmp_path.name} "
        "--layers 2 demo"
    )


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A repository with one source, of which results are kept; returns its git."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root = tmp_path / "tree"
    results = root / "benchmarks" / "results"
    (root / "code").mkdir(parents=True)
    results.mkdir(parents=True)
    monkeypatch.setattr(provenance, "ROOT", root)
    monkeypatch.setattr(provenance, "RESULTS", results)
    monkeypatch.setattr(provenance, "MANIFEST", results / "manifest.json")
    monkeypatch.setattr(provenance, "SOURCES", {"code": ("code/*.py", "code/late/*.py")})
    monkeypatch.setattr(sys, "argv", [str(root / "benchmarks" / "a.py"), "--fast"])

    def git(*words: str) -> str:
        names = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", *names, *words], cwd=root, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "--quiet")
    (root / "code" / "a.py").write_text("a = 1\n")
    (root / "code" / "note.txt").write_text("not measured")
    (root / "other").mkdir()
    (root / "other" / "a.py").write_text("a = 2\n")
    git("add", ".")
    git("commit", "--quiet", "--message=first")
    return git


def entries() -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads(provenance.MANIFEST.read_text())["results"]
    return found


def test_results_are_recorded_with_their_code(tree: Callable[..., str], tmp_path: Path) -> None:
    source = provenance.ROOT / "code" / "a.py"
    late = provenance.ROOT / "code" / "late" / "b.py"
    first = tree("rev-parse", "HEAD")
    early = provenance.digest_of({"a.py": "a = 1\n"})
    with pytest.raises(FileNotFoundError, match="no file is code/late"):
        provenance.digest("code")
    late.parent.mkdir()
    late.write_text("b = 2\n")
    result, other = provenance.RESULTS / "r.json", tmp_path / "elsewhere.json"
    for path in (result, other):
        path.write_text("{}\n")
    provenance.keep([result, other], ["code"])
    (entry,) = entries().values()
    today = provenance.digest_of({"a.py": "a = 1\n", "b.py": "b = 2\n"})
    assert (entry["command"], entry["commit"], entry["clean"], entry["sources"]) == (
        "python benchmarks/a.py --fast",
        first[:12],
        False,
        {"code": today},
    )
    assert entry["sha256"] == provenance.file_digest(result)
    tree("add", "code")
    tree("commit", "--quiet", "--message=second")
    provenance.keep([result], ["code"])  # the manifest and the result alone are not committed
    assert entries()["r.json"]["clean"] is True
    tree("add", ".")
    tree("commit", "--quiet", "--message=third")
    result.write_text("[]\n")
    assert provenance.origin(["code"])["clean"] is True
    source.write_text("a = 3\n")
    assert provenance.origin(["code"])["clean"] is False
    kept = provenance.origin(["code"])
    source.write_text("a = 1\n")
    provenance.keep([result], ["code"], command="make", origin=kept)
    assert entries()["r.json"]["sources"] == kept["sources"] != {"code": today}
    provenance.adopt(result, first[:7], ["code"], "make", "a machine", None, "of old")
    entry = entries()["r.json"]
    assert (entry["commit"], entry["clean"], entry["machine"], entry["shown_as"]) == (
        first[:12],
        None,
        "a machine",
        "of old",
    )
    assert entry["sources"] == {"code": early} != {"code": today}
    assert provenance.digest_at("code", "HEAD") == today == provenance.digest("code")


def test_a_statement_covers_all_older_results(tree: Callable[..., str]) -> None:
    late = provenance.ROOT / "code" / "late" / "b.py"
    late.parent.mkdir()
    late.write_text("b = 2\n")
    for name in ("r.json", "shown.json"):
        (provenance.RESULTS / name).write_text(name)
    provenance.adopt(provenance.RESULTS / "shown.json", "HEAD", ["code"], "make", "m", None, "old")
    (provenance.ROOT / "code" / "a.py").write_text("a = 4\n")
    tree("commit", "--quiet", "--all", "--message=second")
    provenance.adopt(provenance.RESULTS / "r.json", "HEAD", ["code"], "make", "m", None, None)
    early = provenance.digest_at("code", "HEAD")
    provenance.state("code", "adds what no result reads")
    provenance.state("code", "says it twice")
    statements = provenance.read_manifest()["statements"]
    assert statements == [
        {
            "sources": "code",
            "from": early,
            "to": provenance.digest("code"),
            "because": "adds what no result reads",
        }
    ]
    assert provenance.is_current("code", early, statements)
    late.write_text("b = 3\n")
    assert not provenance.is_current("code", early, statements)


def test_commands_of_the_manifest(
    tree: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*words: object) -> dict[str, dict[str, object]]:
        monkeypatch.setattr(sys, "argv", ["provenance.py", *map(str, words)])
        provenance.main()
        return entries()

    late = provenance.ROOT / "code" / "late" / "b.py"
    late.parent.mkdir()
    late.write_text("b = 2\n")
    results = [provenance.RESULTS / name for name in ("z.json", "a.json")]
    for path in results:
        path.write_text(path.name)
    said = ("--sources", "code", "--command", "make it")
    found = run("record", *results, *said)
    assert list(found) == ["a.json", "z.json"]
    today = {"code": provenance.digest("code")}
    assert [entry["command"] for entry in found.values()] == ["make it", "make it"]
    assert [entry["sources"] for entry in found.values()] == [today, today]
    head = tree("rev-parse", "HEAD")[:12]
    early = {"code": provenance.digest_of({"a.py": "a = 1\n"})}
    for more, clean in (((), None), (("--clean", "yes"), True), (("--clean", "no"), False)):
        found = run("adopt", results[0], *said, "--commit", "HEAD", "--machine", "m", *more)
        entry = found["z.json"]
        assert (entry["commit"], entry["machine"], entry["clean"]) == (head, "m", clean)
        assert (entry["sources"], "shown_as" in entry) == (early, False)
    run("statement", "code", "--because", "a name")
    assert provenance.read_manifest()["statements"] == [
        {"sources": "code", "from": early["code"], "to": today["code"], "because": "a name"}
    ]
    shown = ("--shown-as", "of old", "--commit", "HEAD", "--machine", "m")
    assert run("adopt", results[1], *said, *shown)["a.json"]["shown_as"] == "of old"


def test_without_git_a_tree_is_not_clean(
    tree: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(provenance.ROOT / "none"))
    found = provenance.origin([])
    assert found == {"commit": None, "clean": False, "sources": {}}
