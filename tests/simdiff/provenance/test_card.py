"""The model card: what hubs read of it, and that no name or licence can break it."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from simdiff import cli
from simdiff.planning.plan import PruningPlan
from simdiff.provenance.card import card, config_changes, write_card
from simdiff.recovery.record import STAGES, RecoveryRecord
from simdiff.scoring.scores import LayerScores
from support.plans import ODD_NAMES, plan_for

SMALL = ("--num-windows", "4", "--window-length", "16")


def parts(text: str) -> tuple[dict[str, Any], str]:
    """The header, read by PyYAML and by the hub's own client, and the rest."""
    match = re.match(r"\A---\n(.*?)\n---\n", text, re.DOTALL)
    header = yaml.safe_load(match[1])
    assert ModelCard(text).data.to_dict() == {k: v for k, v in header.items() if v is not None}
    return header, text[match.end() :]


def source(folder: Path, front_matter: str = "", **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    if front_matter:
        (folder / "README.md").write_text(f"---\n{front_matter}\n---\n# Their card\n")
    for name, text in files.items():
        (folder / name.replace("_md", ".md")).write_text(text)
    return folder


def test_hub_metadata() -> None:
    header, body = parts(card(plan_for(6, (4, 1), name="org/model-7B"), source_directory=None))
    assert header["base_model"] == "org/model-7B"
    assert header["base_model_relation"] == "finetune"
    assert header["library_name"] == "transformers"
    assert header["pipeline_tag"] == "text-generation"
    assert "pruned" in header["tags"]
    assert "license" not in header
    assert "No licence was found" in body
    assert body.startswith("\n# `model-7B` with 4 of 6 layers")
    assert "- Removed: 4, 1 (the least important first)" in body
    assert "- In order: 1, 4" in body
    assert "- Stayed: 0, 2-3, 5" in body
    assert "`block-influence`: `mean(1 - cos)`" in body


def test_the_demo_names_what_it_is() -> None:
    header, _ = parts(card(plan_for(6, (1,), name="demo"), source_directory=None))
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert header["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("front_matter", "files", "wanted"),
    [
        (
            "license: apache-2.0\nlanguage: [de, en]",
            {},
            {"license": "apache-2.0", "language": ["de", "en"]},
        ),
        (
            "license: other\nlicense_name: acme\nlicense_link: TERMS_md",
            {},
            {"license": "other", "license_name": "acme", "license_link": "TERMS_md"},
        ),
        (
            "license: llama3\nlicense_link: https://example.com/a",
            {"LICENSE": "META LLAMA 3"},
            {"license": "llama3", "license_link": "https://example.com/a"},
        ),
        (
            "",
            {"LICENSE": "   Apache License\n   Version 2.0, January 2004"},
            {"license": "apache-2.0"},
        ),
        ("", {"LICENSE": "MIT License\n\nCopyright"}, {"license": "mit"}),
        (
            "",
            {"LICENSE": "You may not."},
            {
                "license": "other",
                "license_name": "license-of-the-base-model",
                "license_link": "LICENSE",
            },
        ),
        ("license: [broken", {}, {}),
        ("- a list", {}, {}),
        ("pipeline_tag: image-text-to-text", {}, {"pipeline_tag": "image-text-to-text"}),
    ],
)
def test_licence_is_carried_over(
    front_matter: str, files: dict[str, str], wanted: dict[str, Any], tmp_path: Path
) -> None:
    folder = source(tmp_path / "source", front_matter, **files)
    header, body = parts(card(plan_for(6, (1,)), source_directory=folder))
    keys = ("license", "license_name", "license_link", "language")
    for key in keys:
        assert header.get(key) == wanted.get(key), key
    assert header["pipeline_tag"] == wanted.get("pipeline_tag", "text-generation")
    assert ("No licence was found" in body) == ("license" not in wanted)


def test_licence_files_go_along(tmp_path: Path) -> None:
    folder = source(
        tmp_path / "source",
        "license: other\nlicense_link: TERMS.md",
        LICENSE="You may.",
        NOTICE="Notice",
        TERMS_md="Terms",
        secrets="no",
    )
    (folder / "config.json").write_text(json.dumps({"_name_or_path": "org/big", "n": 6, "l": [1]}))
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"n": 4, "l": [], "dtype": "float32"}))
    write_card(target, plan_for(6, (1,)), folder)
    assert sorted(path.name for path in target.iterdir()) == [
        "LICENSE",
        "NOTICE",
        "README.md",
        "TERMS.md",
        "config.json",
    ]
    header, body = parts((target / "README.md").read_text())
    assert header["base_model"] == "org/big"
    assert "- `n`: `6` to `4`\n- `l`: 1 entries to 0" in body
    assert "Their card" not in body


def test_the_card_of_a_hub_name_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it lies in the hub's cache; nothing is asked of the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = tmp_path / "cache" / "models--org--tiny" / "snapshots" / "abc"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    snapshot.mkdir(parents=True)
    source(snapshot, "license: other\nlicense_name: acme\nlicense_link: LICENSE", LICENSE="Acme")
    target = tmp_path / "target"
    target.mkdir()
    write_card(target, plan_for(6, (1,), name="org/tiny"), "org/tiny")
    header, body = parts((target / "README.md").read_text())
    assert (header["base_model"], header["license_name"]) == ("org/tiny", "acme")
    assert (target / "LICENSE").read_text() == "Acme"
    assert "Copied from it: `LICENSE`" in body
    write_card(target, plan_for(6, (1,), name="org/none"), "org/none")
    assert "license" not in parts((target / "README.md").read_text())[0]


@pytest.mark.parametrize("link", ["../secret", "{}/a/secret", "..", ".", "README.md"])
def test_a_licence_link_does_not_leave_the_source(link: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "secret").write_text("secret")
    front_matter = f"license: other\nlicense_link: {link.format(tmp_path)}"
    folder = source(tmp_path / "a" / "source", front_matter)
    target = tmp_path / "target"
    target.mkdir()
    write_card(target, plan_for(6, (1,)), folder)
    assert [path.name for path in target.iterdir()] == ["README.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "target"]
    assert "Copied from it" not in (target / "README.md").read_text()


EVIL = [
    *ODD_NAMES,
    "---\nlicense: mit\n---\n# mine",
    "`` ` ``` |x| <script>alert(1)</script>",
    "```\nrm -rf /\n```",
    "$(touch x); 'y' \"z\"",
    "\udcff",
]


SECTIONS = [
    "How to load",
    "What was removed",
    "Quality",
    "Scores of every layer",
    "Calibration",
    "Changes of the config",
    "How to reproduce",
    "Licence",
]


@pytest.mark.parametrize("name", EVIL)
def test_odd_names_break_nothing(name: str, tmp_path: Path) -> None:
    plan = plan_for(6, (4, 1), name=name)
    plan = dataclasses.replace(
        plan,
        calibration={"source": name, "seed": 0, "num_windows": 4},
        notes=(name,),
        formula=name,
    )
    folder = source(tmp_path / "source", "license: apache-2.0")
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({name: name}))
    write_card(target, plan, folder)
    header, body = parts((target / "README.md").read_text(encoding="utf-8"))
    assert header["license"] == "apache-2.0"
    assert header.get("base_model") in (None, name)
    assert all(character.isprintable() or character == "\n" for character in body)
    headings = re.findall(r"^#+ (.*)", body, flags=re.MULTILINE)
    assert headings[0].endswith("with 4 of 6 layers")
    assert headings[1:] == SECTIONS
    assert "<script>" not in re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", body, flags=re.DOTALL)
    fences = re.findall(r"^(`{3,})(\w*)$", body, flags=re.MULTILINE)
    assert [language for _, language in fences] == ["python", "", "sh", ""]


def test_scores_and_results(llama_scores: LayerScores) -> None:
    plan = dataclasses.replace(
        plan_for(6, (4, 1)), calibration={"source": "corpus.txt", "seed": 3, "num_windows": 8}
    )
    results = {
        "dense": {"perplexity": 20.456, "num_parameters": 1000},
        "pruned": {"perplexity": 68.69, "num_parameters": 800},
        "evaluation": {
            "source": "corpus.txt",
            "part": "held-out",
            "num_windows": 4,
            "window_length": 16,
        },
    }
    _, body = parts(card(plan, source_directory=None, scores=llama_scores, results=results))
    assert "| held-out perplexity | 20.46 | 68.69 | 3.358 |" in body
    assert "| parameters | 1,000 | 800 | 0.800 |" in body
    rows = re.findall(r"^\| (\d) \|(.*)\|$", body, flags=re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(6))
    for layer, row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        assert len(cells) == 6
        assert cells[0] == f"{llama_scores.metrics['cosine_distance'].mean[int(layer)]:.4g}"
        assert cells[4] == f"{plan.importance[int(layer)]:.4g}"
        assert cells[5] == ("removed" if int(layer) in plan.removed else "")
    assert "`source`: `corpus.txt`" in body
    without = card(plan, source_directory=None)
    assert "Not measured" in without
    assert "MSSD" not in without


def commands(body: str) -> list[list[str]]:
    import shlex

    block = re.search(r"^```sh\n(.*?)\n```$", body, flags=re.MULTILINE | re.DOTALL)[1]
    return [shlex.split(line) for line in block.splitlines()]


def test_the_commands_of_the_card_make_the_same_model_again(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run = ["run", str(tiny_checkpoint), "--text", str(tiny_text), "--ratio", "0.4", "-o", str(out)]
    assert cli.main([*run, *SMALL, "--seed", "5", "--protect", "0"]) == 0
    model = out / "model"
    header, body = parts((model / "README.md").read_text())
    assert "base_model" not in header, "a local directory is no name on a hub"
    assert "held-out perplexity" in body
    assert "- `num_hidden_layers`: `6` to `4`" in body
    again = tmp_path / "again"
    again.mkdir()
    monkeypatch.chdir(again)
    for command in commands(body):
        if command[0] == "simdiff":
            assert cli.main(command[1:]) == 0, command
    first, second = PruningPlan.load(model / "plan.json"), PruningPlan.load(again / "plan.json")
    assert (first.asked, second.asked) == ({"ratio": 0.4}, {"num_layers": 2})
    first, second = (dataclasses.replace(plan, model={}, asked={}) for plan in (first, second))
    assert first == second
    weights = "model.safetensors"
    assert (again / "pruned" / weights).read_bytes() == (model / weights).read_bytes()
    _, later = parts((again / "pruned" / "README.md").read_text())
    assert "Not measured" in later


def test_config_changes_of_unreadable_configs(tmp_path: Path) -> None:
    assert config_changes(None, tmp_path) == []
    assert config_changes(tmp_path, tmp_path) == []


def test_words_of_others_act_as_nothing() -> None:
    """Outside of code no word of a plan or of a record of recovery stands; shells see one word."""
    evil = "<script>`x`</script> | [a](b) **c** $(rm)\n# d ``"
    identity = {"source": evil, "part": evil, "num_windows": 1, "window_length": 2, "column": evil}
    record = RecoveryRecord(
        method=evil,
        formula=evil,
        trained=True,
        settings={evil: evil},
        changed={"a": "b"},
        calibration=identity,
        evaluation={**identity, "part": "all"},
        quality={stage: {"perplexity": 2.0, "nll": 0.7} for stage in STAGES},
        seconds=1.0,
        machine=evil,
        notes=(evil,),
    )
    plan = dataclasses.replace(
        plan_for(6, (1,), name=evil), notes=(evil,), options={evil: evil}, calibration=identity
    )
    for text in (
        card(plan, source_directory=None),
        card(plan, source_directory=None, recovery=record, changes=[]),
    ):
        _, body = parts(text)
        outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", body)
        outside = re.sub(r"(?s)(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)
        for mark in ("<script", "$(rm)", "[a]", "**c**", "# d"):
            assert mark not in outside, mark
        (commands,) = re.findall(r"(?ms)^(`{3,})sh\n(.*?)^\1$", body)
        for line in commands[1].splitlines():
            for word in shlex.split(line):
                assert word.count("$(rm)") <= 1
            assert "$(rm)" not in re.sub(r"'[^']*'", "", line)
