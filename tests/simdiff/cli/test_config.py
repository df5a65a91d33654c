"""Options from a YAML file, and the config.yaml that repeats a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import yaml

from simdiff import cli
from simdiff.cli.config import config_text

SMALL = ("--num-windows", "4", "--window-length", "16")


def simdiff(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def parsed(*words: object) -> argparse.Namespace:
    texts = [str(word) for word in words]
    return cli._parsed(texts[0], texts)[0]


def written(folder: Path, **values: object) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_values_of_the_file_and_of_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: ./mine\ntext: corpus.txt\nnum-windows: 7\nratio: 0.5\nalpha: 1e-1\n"
        "protect: [0, 1, 28-29]\nsublayers_are_no_option_of_run:\n"
    )
    with pytest.raises(cli.SimdiffError, match="has no option 'sublayers_are"):
        parsed("run", "--config", path, "-o", "out")
    path.write_text(path.read_text().rsplit("\n", 2)[0])
    given = parsed("run", "--config", path, "-o", "out")
    assert (given.model, given.text, given.num_windows) == ("./mine", "corpus.txt", 7)
    assert (given.ratio, given.alpha, given.protect) == (0.5, 0.1, (0, 1, 28, 29))
    assert given.window_length == 512
    given = parsed("run", "other", f"--config={path}", "-o", "out", "--num-windows=9")
    assert (given.model, given.num_windows, given.text) == ("other", 9, "corpus.txt")


def test_what_excludes_an_option_of_the_file_puts_it_aside(tmp_path: Path) -> None:
    path = written(tmp_path, ratio=0.5, model="demo")
    given = parsed("run", "--config", path, "-o", "out", "--num-layers", 3)
    assert (given.ratio, given.num_layers) == (None, 3)
    given = parsed("run", "--config", path, "-o", "out", "--ratio=0.1")
    assert given.ratio == 0.1


def test_several_texts(tmp_path: Path) -> None:
    """In a file and on the command line, whose texts put those of the file aside."""
    weights = ("--text-weights", "2,0.5")
    given = parsed("score", "m", "--text", "a", "--text=b", *weights, "-o", "s")
    assert (given.text, given.text_weights) == (["a", "b"], (2.0, 0.5))
    path = tmp_path / "run.yaml"
    path.write_text(config_text(given))
    again = parsed("score", "--config", path, "-o", "s")
    assert (again.text, again.text_weights) == (["a", "b"], (2.0, 0.5))
    assert parsed("score", "--config", path, "--text", "c", "-o", "s").text == "c"
    assert parsed("score", "--config", path, "--text", "c", "--text", "d", "-o", "s").text == [
        "c",
        "d",
    ]
    with pytest.raises(SystemExit):
        parsed("score", "m", "--text-weights", "2,0", "-o", "s")


def test_several_models_and_flags(tmp_path: Path) -> None:
    path = written(tmp_path, models=["a", "b"], json=True, tasks=["piqa", "arc_easy"])
    given = parsed("eval", "--config", path)
    assert (given.models, given.json, given.tasks) == (["a", "b"], True, ("piqa", "arc_easy"))
    assert parsed("eval", "c", "--config", path).models == ["c"]
    one = written(tmp_path, models="a", tasks="piqa")
    assert parsed("eval", "--config", one).models == ["a"]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"num_window": 3}, "`simdiff run` has no option 'num_window'; did you mean num_windows?"),
        ({"unit": "mlp"}, "`simdiff run` has no option 'unit'"),
        ({"help": True}, "`simdiff run` has no option 'help'"),
        ({"num_windows": "many"}, "num_windows: must be of type int, got 'many'"),
        ({"num_windows": 2.5}, "num_windows: must be of type int, got 2.5"),
        ({"text": True}, "text: must be a number, a text or a list, got True"),
        ({"overwrite": 1}, "overwrite: must be true or false, got 1"),
        ({"dtype": "int8"}, "dtype: must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"protect": "a-b"}, "protect: must be layers such as 0,1,28-29, got 'a-b'"),
        ({"command": "recover"}, "is for `simdiff recover`, not for `simdiff run`"),
    ],
)
def test_refusals(
    tmp_path: Path, values: dict[str, object], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, **values)
    assert simdiff("run", "demo", "--config", path, "-o", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"simdiff run: error: {path}")
    assert wanted in said


@pytest.mark.parametrize(
    ("content", "wanted"),
    [(None, "No such file"), ("- a\n- b\n", "a mapping from options"), ("a: [", "but is not")],
)
def test_files_that_are_none(
    tmp_path: Path, content: str | None, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    assert simdiff("run", "demo", "--config", path, "-o", tmp_path / "out") == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["run", "m", "--bootstrap", "0", "--protect", "0,3-5", "--seed", "0", "--ratio", "0.1"],
        ["run", "m", "--calibrate-until-stable", "--max-memory", "1.5", "--text", "yes"],
        ["compare", "m", "--criteria", "last-n,random", "--num-layers", "2-4", "--text", "12"],
        ["compare", "m", "--evaluation-windows", "0", "--alpha", "1e-07"],
        ["prune", "m", "--plan", "plan.json", "--max-shard-size", "1000", "--threads", "2"],
        ["recover", "m", "--plan", "p", "--method", "lora", "--learning-rate", "1e-4"],
        ["recover", "m", "--plan", "p", "--train-on-prompts", "--targets", "q_proj,k_proj"],
    ],
)
def test_what_is_written_is_what_was_given(words: list[str], tmp_path: Path) -> None:
    """Zeros, floats, lists, flags and texts that YAML takes for something else come back."""
    given = parsed(*words, "-o", "out", "--json", "--overwrite")
    path = tmp_path / "config.yaml"
    path.write_text(config_text(given))
    again = vars(parsed(words[0], "--config", path, "-o", "out"))
    wanted = vars(given) | {"json": False, "overwrite": False, "config": path}
    del again["parser"], wanted["parser"]
    assert again == wanted


def without_time(path: Path) -> object:
    content = json.loads(path.read_text())
    return {key: value for key, value in content.items() if key != "created"}


def test_a_run_repeated(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    more = ("--num-layers", 2, "--protect", "0", "--bootstrap", 20, "--threads", 1)
    assert simdiff("run", tiny_checkpoint, "--text", tiny_text, *SMALL, *more, "-o", out) == 0
    lines = (out / "config.yaml").read_text().splitlines()
    assert {"command: run", f"model: {tiny_checkpoint}", "num_windows: 4"} <= {*lines}
    content = yaml.safe_load("\n".join(lines))
    assert not {"output", "overwrite", "json", "ratio"} & set(content)
    capsys.readouterr()
    assert simdiff("rerun", out, "-o", again, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "command": "run",
        "output": str(again),
        "same": True,
        "circumstances": {},
        "results": {},
    }
    for name in ("scores.json", "plan.json"):
        assert without_time(out / name) == without_time(again / name)
    for name in ("config.yaml", "model/model.safetensors"):
        assert (out / name).read_bytes() == (again / name).read_bytes()
    assert simdiff("rerun", out, "-o", out, "--overwrite") == 2, "it would replace its config"
    assert simdiff("rerun", out / "model", "-o", tmp_path / "other") == 2
    assert "model: must hold the config.yaml" in capsys.readouterr().err


def test_prune_and_recover_repeated(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, plan = tmp_path / "scores.json", tmp_path / "plan.json"
    text = ("--text", tiny_text, *SMALL)
    assert simdiff("score", tiny_checkpoint, *text, "-o", scores) == 0
    assert simdiff("plan", scores, "--num-layers", 2, "-o", plan) == 0
    commands = {
        "prune": ("--plan", plan, "--max-shard-size", 20_000),
        "recover": ("--plan", plan, *text, "--norm-power", 1, "--threads", 1),
    }
    for command, options in commands.items():
        out, again = tmp_path / command, tmp_path / f"{command}-again"
        assert simdiff(command, tiny_checkpoint, *options, "-o", out) == 0
        assert simdiff("rerun", out, "-o", again) == 0
        assert "Every plan, number and weight is the same." in capsys.readouterr().out
        files = sorted(path.name for path in out.iterdir())
        assert files == sorted(path.name for path in again.iterdir())
        for name in files:
            if name.endswith(".safetensors") or name == "config.yaml":
                assert (out / name).read_bytes() == (again / name).read_bytes(), (command, name)
    assert len(list((tmp_path / "prune").glob("*.safetensors"))) > 1, "the option was read"
    record = json.loads((tmp_path / "recover-again" / "recovery.json").read_text())
    assert record["settings"]["norm_power"] == 1
    # What repeats a command is no part of the model: a further cut has its own.
    further = tmp_path / "further"
    assert simdiff("score", tmp_path / "prune", *text, "-o", scores, "--overwrite") == 0
    assert simdiff("plan", scores, "--num-layers", 1, "-o", plan, "--overwrite") == 0
    assert simdiff("prune", tmp_path / "prune", "--plan", plan, "-o", further) == 0
    assert yaml.safe_load((further / "config.yaml").read_text())["model"] == str(tmp_path / "prune")


def test_a_comparison_repeated(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    more = ("--criteria", "last-n,simdiff", "--num-layers", "2", "--evaluation-windows", 1)
    assert simdiff("compare", tiny_checkpoint, "--text", tiny_text, *SMALL, *more, "-o", out) == 0
    text = tiny_text.read_text()
    tiny_text.write_text(text.replace("w5 ", "w6 "))
    capsys.readouterr()
    assert simdiff("rerun", out, "-o", again) == 0
    told = capsys.readouterr().out
    assert "Today differs the text (" in told
    assert "Result differs: scores.json, metrics." in told
    tiny_text.write_text(text)
    assert simdiff("compare", "--config", out / "config.yaml", "-o", again, "--overwrite") == 0
    first, second = (json.loads((path / "compare.json").read_text()) for path in (out, again))
    assert [cell["criterion"] for cell in first["cells"]] == ["last-n", "simdiff"]
    for one, other in zip(first["cells"], second["cells"], strict=True):
        assert (one["removed"], one["quality"]) == (other["removed"], other["quality"])
