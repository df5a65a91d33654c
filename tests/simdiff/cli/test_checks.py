"""What is wrong is told at once, in one line, with what may have been meant."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from support.commands import simdiff
from support.plans import plan_for


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of six layers by its config alone, a text, a plan, a file of somebody's."""
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text('{"num_hidden_layers": 6}')
    (tmp_path / "corpus.txt").write_text("some words\n\nand more")
    (tmp_path / "thesis.txt").write_text("precious")
    plan_for(6, (1, 2)).save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = "run ./my-model --text corpus.txt -o out"
CASES = {
    "prune ./my-modell --plan plan.json -o x": "model ./my-modell: no such directory; did you mean "
    "my-model?",
    "prune ../my-model --plan plan.json -o x": "model ../my-model: no such directory",
    "prune ./small.gguf --plan plan.json -o x": "model ./small.gguf: no such file",
    "score ./my-model --text corpus.tx -o s.json": "did you mean corpus.txt?",
    "score ./my-model --text '' -o s.json": "text: must be a file, a folder, - for standard input "
    "or 'demo', got an empty name",
    "score '' --text corpus.txt -o s.json": "model: must be a directory, a hub name or 'demo', got "
    "an empty name",
    "score ./my-model --states none -o s.json": "none: No such file or directory",
    "score ./my-model --text corpus.txt -o s.json --calibrate-until-stable --num-layers 6": "1 to "
    "5 of 6, got 6",
    "score ./my-model -o s.json": "--text must be given for a model of your own",
    "recover ./my-model --plan plan.json -o x": "--text must be given for a model of your own",
    "prune ./my-model --plan plam.json -o x": "plam.json: No such file or directory; did you mean "
    "plan.json?",
    "prune ./my-model --plan corpus.txt -o x": "corpus.txt: must be a plan",
    "prune ./my-model -o x": "must say which layers go, got neither",
    "bench ./my-model --remove 99": "layers to remove",
    "bench ./my-model --remove 0-5": "must name 1 to 5 layers of 6, got 6",
    "bench ./my-model --remove 1 --page -": "--page must be a path, and not -",
    "bench ./my-model --remove 1 -o b.html --page ./b.html": "--page must not be the file of "
    "--output, b.html",
    "bench ./my-model --remove 1 --page corpus.txt --overwrite": "is nothing that simdiff wrote",
    "bench ./my-model --remove 1 --batch-sizes 4,0": "--batch-sizes must be at least 1, got 0",
    "eval ./my-model --text corpus.txt --window-length 32 --stride 99": "--stride must be 1 to 32 "
    "tokens (a window), got 99",
    "bench ./my-model": "must say what is compared, got none",
    "eval ./my-model --remove 6 --text corpus.txt": "layers to remove",
    "eval ./my-model": "--text, --tasks or both must be given",
    "eval ./my-model x ./my-model --text corpus.txt": "each model must be given once, got "
    "./my-model twice",
    f"{RUN} --num-layers 6": "1 to 5 of 6, got 6",
    f"{RUN} --log trackioo": "--log must be of trackio, wandb, mlflow, tensorboard, got 'trackioo'",
    "compare ./my-model --text corpus.txt -o out --num-layers 2,6": "1 to 5 of 6, got 6",
    f"{RUN} --protect 9": "indices from 0 to 5, got 9",
    f"{RUN} --windows 0": "--num-windows must be at least 1, got 0",
    f"{RUN} --threads 99999": "--threads must be at most",
    f"{RUN} --threads 0": "--threads must be at least 1, got 0",
    "compare ./my-model --text corpus.txt -o out --criteria simdif": "there is no criterion "
    "'simdif'; did you mean simdiff?",
    "recover ./my-model --plan plan.json --text corpus.txt -o x --rank 3": "of another method",
    "score ./my-model --text corpus.txt -o no/s.json": "its parent directory must exist",
    "score ./my-model --text corpus.txt -o thesis.txt": "give another path, or --overwrite",
    "score ./my-model --text corpus.txt -o thesis.txt --overwrite": "is nothing that simdiff wrote",
    "score ./my-model --text corpus.txt -o corpus.txt --overwrite": "must not be the input itself",
    "score ./my-model --text corpus.txt -o plan.json --overwrite": "is a plan.json",
    "score ./my-model --text corpus.txt -o /dev/null": "- is standard output",
    "export plan.json --format list -o plan.json --overwrite": "must not be the input itself",
    "export plan.json --format vllm --model ./my-model -o v": "plan.json: must be a plan of "
    "sub-layers for --format vllm (`simdiff plan --unit sublayer`), and is none",
    "prune ./my-model --plan plan.json -o plan.json --overwrite": "must not be the input itself",
    "prune ./my-model --plan plan.json -o thesis.txt --overwrite": "is nothing that simdiff wrote",
    "prune ./my-model --plan plan.json -o -": "--output - is for text; the directory of a pruned",
    "report thesis.txt -o x.html": "error: thesis.txt must be a directory with plan.json",
    "plan none.json": "none.json: No such file or directory\n",
    "score corpus.txt --text corpus.txt -o s.json": "is a file, and a model is a directory",
    "plan thesis.txt --config pln.yaml": "must be a readable YAML file: No such file",
}


@pytest.mark.parametrize("command", CASES)
def test_refused_before_anything_is_loaded(command: str, folder: Path, capsys) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert simdiff(*shlex.split(command)) == 2
    told = capsys.readouterr()
    assert CASES[command] in told.err
    assert (told.out, told.err.count("\n")) == ("", 1), "one line, and no usage"
    assert told.err.startswith(f"simdiff {command.split()[0]}: error: ")
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_a_hub_name_is_left_to_the_hub(folder: Path, capsys) -> None:
    command = "prune org/model --plan plan.json -o thesis.txt"
    assert simdiff(*command.split()) == 2
    assert "must not exist yet" in capsys.readouterr().err, "the name is none that cannot be"


def test_as_many_threads_as_a_machine_has(folder: Path, capsys) -> None:
    count = os.cpu_count() or 1
    assert simdiff(*RUN.replace("corpus", "none").split(), "--threads", count) == 2
    assert "none.txt: must be a text file" in capsys.readouterr().err
