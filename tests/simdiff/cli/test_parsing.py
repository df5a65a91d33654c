"""The options of every command: in groups, few in the first help, one meaning for each name."""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from simdiff import cli
from simdiff.cli.effects import check_effects
from simdiff.cli.examples import EXAMPLES
from simdiff.cli.options import text_of
from simdiff.cli.parsing import CommandParser
from simdiff.errors import SimdiffError
from simdiff.planning import names
from simdiff.recovery.methods import METHODS, check_options
from simdiff.recovery.training.option_table import TRAINING_OPTIONS, TRAINING_PRESETS, parts_of

COMMANDS = list(cli.COMMANDS)


def parsers() -> dict[str, CommandParser]:
    return cli._parsers()[1]


def printed(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, flag])
    assert caught.value.code == 0
    return capsys.readouterr().out


def listed(text: str) -> list[str]:
    """The options that a help explains, by their first name."""
    return re.findall(r"^  (--?[a-z][a-z-]*)", text, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_and_help_all_is_whole(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    short, whole = (printed(command, flag, capsys) for flag in ("--help", "--help-all"))
    assert 5 <= len(listed(short)) <= 15
    every = [action for action in parsers()[command]._actions if action.option_strings]
    assert sorted(listed(whole)) == sorted(action.option_strings[0] for action in every)
    assert set(listed(short)) <= set(listed(whole))
    for text in (short, whole):
        assert "None" not in text
        assert "False" not in text
        assert "SUPPRESS" not in text
        assert "\noptions:" not in text, "every option stands in a group that has a name"
    if len(every) > 17:
        assert len(listed(short)) < len(every)


def test_every_command_has_examples_that_parse() -> None:
    assert list(EXAMPLES) == COMMANDS
    for command, lines in EXAMPLES.items():
        for line in lines:
            words = shlex.split(line)
            assert words[:2] == ["simdiff", command]
            arguments, given = cli._parsed(command, words[1:])
            check_effects(arguments, given)
        assert f"examples:\n  {lines[0]}\n" in str(parsers()[command].format_help())


def test_defaults_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(printed("run", "--help-all", capsys).split())
    for words in (
        "number of windows of text to read (default: 32)",
        "for no default",
        "number of tokens in a window (default: 512)",
    ):
        assert (words in text) == (words != "for no default")
    assert "relative-magnitude" in text, "a name is not broken at its hyphen"


def test_a_name_means_one_thing() -> None:
    """The same option takes the same type in every command that has it."""
    kinds: dict[str, dict[object, list[str]]] = {}
    for command, parser in parsers().items():
        for action in parser._actions:
            for flag in action.option_strings:
                kind = (action.type, action.nargs, action.dest)
                kinds.setdefault(flag, {}).setdefault(kind, []).append(command)
    several = {flag: found for flag, found in kinds.items() if len(found) > 1}
    assert set(several) == {"--num-layers"}, "compare removes several numbers of layers"
    assert kinds["--alpha"].keys() == {(float, None, "alpha")}
    assert "recover" not in kinds["--alpha"][float, None, "alpha"]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["score", "demo", "-o", "s.json", "--criterion", "random"], ""),
        (["run", "demo", "-o", "out", "--num-lay", "3"], "; did you mean --num-layers?"),
        (["run", "demo", "-o", "out", "--num_windows", "3"], "; did you mean --num-windows?"),
        (
            ["recover", "demo", "-o", "out", "--plan", "p.json", "--speed", "3"],
            "; did you mean --seed?",
        ),
    ],
)
def test_what_is_no_option_is_refused(
    words: list[str],
    meant: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said == f"simdiff {words[0]}: error: there is no option {words[-2]}{meant}\n"


def test_a_model_of_your_own_asks_for_its_text() -> None:
    given = argparse.Namespace(model="./mine", text=None)
    with pytest.raises(SimdiffError, match="--text must be given for a model of your own"):
        text_of(given)
    assert text_of(argparse.Namespace(model="demo", text=None)) == "demo"
    assert text_of(argparse.Namespace(model="./mine", text="demo")) == "demo"


def test_options_of_training_stand_in_one_place() -> None:
    """The command, the methods and the recipes take the same names."""
    from simdiff.recovery.training.lora import LoraOptions
    from simdiff.recovery.training.options import Distillation, FineTuningOptions

    taken = {action.dest for action in parsers()["recover"]._actions}
    assert set(TRAINING_OPTIONS) <= taken
    every = {name for method in TRAINING_PRESETS for name in METHODS[method].options}
    assert every == set(TRAINING_OPTIONS)
    taught = {"distillation_weight", "temperature"}
    assert taught | {"last_layers"} == every - set(METHODS["lora"].options)
    adapters = {"rank", "lora_alpha", "dropout", "targets"}
    assert adapters == every - set(METHODS["partial"].options)
    for part, kind in (
        ("", FineTuningOptions),
        ("lora", LoraOptions),
        ("distillation", Distillation),
    ):
        known = {field.name for field in fields(kind)} - {"lora", "distillation"}
        assert set(parts_of(part).values()) == known, "each field has its option"


def test_unknown_options_of_methods_are_named() -> None:
    with pytest.raises(SimdiffError, match=r"no method has an option 'rnk'; did you mean rank\?"):
        check_options("lora", {"rnk": 3})
    with pytest.raises(SimdiffError, match="got rank of another method"):
        check_options("closed-form", {"rank": 3})


def test_every_criterion_has_its_name_and_nothing_else_has() -> None:
    from simdiff.planning.criteria import CRITERIA
    from simdiff.sublayers.structure import ALL_KINDS, KINDS

    assert tuple(CRITERIA) == names.CRITERIA
    assert tuple(names.ABOUT) == names.ALL_CRITERIA
    weighed = {name for name, criterion in CRITERIA.items() if criterion.takes_alpha}
    assert set(names.WEIGHED) == weighed
    assert names.DEFAULT_CRITERION in CRITERIA
    assert ("layer", *KINDS, ALL_KINDS) == names.UNITS
