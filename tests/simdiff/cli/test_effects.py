"""Options without effect are refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from simdiff import cli
from simdiff.cli.effects import EFFECTS
from simdiff.errors import SimdiffError
from simdiff.planning.options import PlanOptions
from support.commands import simdiff

CASES = {
    "run m --text {text} -o {new} --alpha 0.9": "--alpha has an effect only with a criterion that",
    "run m --text {text} -o {new} --random-seed 1": "only with the criterion random",
    "run m --text {text} -o {new} --max-windows 9": "only with --calibrate-until-stable",
    "run m --text {text} -o {new} --criterion greedy-perplexity --bootstrap 9": "does not search",
    "run m --text {text} -o {new} --criterion last-n --evaluation-windows 9": "--criterion simdiff",
    "plan {text} --alpha 0.5": "--alpha has an effect only with",
    "plan {text} --alpha 0.5 --criterion simdiff-mssd-swept": "--alpha has an effect only with",
    "plan {text} --evaluation-windows 9": "only with --model",
    "plan {text} --model m --criterion last-n": "--model has an effect only with",
    "plan {text} --overwrite": "--overwrite has an effect only with --output",
    "plan {text} --unit mlp --num-layers 2 --bootstrap 50": "only with --unit layer",
    "score m --text {text} -o {new} --num-layers 8": "--num-layers has an effect only with --cal",
    "score m --text {text} -o {new} --ratio 0.5": "--ratio has an effect only with --calibrate",
    "score m --text {text} -o {new} --text-weights 3": "only with --text given several times",
    "score m --text {text} -o {new} --no-stream --stream-memory 1GB": "which --no-stream forbids",
    "export {text} --format list --model m": "only with --format mergekit or vllm",
    "export {text} --format llama.cpp --model m": "only with --format mergekit or vllm",
    "prune m --remove 1 -o {new} --device cpu": "only with --dtype",
    "eval m --tasks piqa --stride 4": "--stride has an effect only with --text",
    "eval m --text {text} --limit 4": "--limit has an effect only with --tasks",
    "eval m --text {text} --chat-template": "--chat-template has an effect only with --tasks",
    "compare m --text {text} -o {new} --criteria last-n --alpha 0.9": "--alpha has an effect only",
}


@pytest.mark.parametrize("command", CASES)
def test_options_without_effect(command: str, tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words")
    assert simdiff(*command.format(text=text, new=tmp_path / "new").split()) == 2
    told = capsys.readouterr().err
    assert CASES[command] in told
    assert "load" not in told


def test_a_file_of_options_at_their_defaults_is_no_wish(tmp_path: Path, capsys) -> None:
    """What a run writes as config.yaml repeats it; a wish in it is one."""
    config = tmp_path / "run.yaml"
    words = ["plan", str(tmp_path / "none.json"), "--config", str(config)]
    config.write_text("alpha: 0.5\nrandom_seed: 0\n")
    assert simdiff(*words) == 2
    assert "No such file" in capsys.readouterr().err
    config.write_text("alpha: 0.7\n")
    assert simdiff(*words) == 2
    assert "--alpha has an effect only" in capsys.readouterr().err


def test_the_table_names_options_that_exist() -> None:
    for effect in EFFECTS:
        for command in effect.commands:
            known = {action.dest for action in cli._parsers()[1][command]._actions}
            assert set(effect.options) <= known, (command, effect)


def test_alpha_from_python() -> None:
    model = {"num_layers": 8}
    assert PlanOptions(criterion="simdiff-mssd", alpha=0.9).count(model) == 2
    with pytest.raises(SimdiffError, match="alpha has an effect only with a criterion that weighs"):
        PlanOptions(alpha=0.9).count(model)
