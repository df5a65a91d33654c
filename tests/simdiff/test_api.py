"""The Python functions do what the commands do, and take objects, names and documents."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import simdiff
from simdiff.cli import main
from simdiff.io.json_files import read_json
from simdiff.scoring.scores import SCHEMA

SMALL = {"num_windows": 4, "window_length": 16, "batch_size": 2}
FLAGS = ("--num-windows", "4", "--window-length", "16", "--batch-size", "2")


def content(value: dict[str, object]) -> dict[str, object]:
    return {key: entry for key, entry in value.items() if key != "created"}


def loaded(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, simdiff; assert 'torch' not in sys.modules; simdiff.score; assert 'torch' in sys.modules"  # noqa: E501
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"score", "plan", "prune", "SimdiffError"} <= set(dir(simdiff))
    assert simdiff.__version__ == version("simdiff-kernels")
    with pytest.raises(AttributeError, match="no attribute 'scored'"):
        _ = simdiff.scored


def test_functions_and_commands_write_the_same(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    model, text, by_command = str(tiny_checkpoint), str(tiny_text), tmp_path / "commands"
    by_command.mkdir()
    files = [str(by_command / name) for name in ("scores.json", "plan.json", "model")]
    assert main(["score", model, "--text", text, *FLAGS, "--output", files[0]]) == 0
    assert (
        main(["plan", files[0], "--num-layers", "2", "--model", model, "--output", files[1]]) == 0
    )
    assert main(["prune", model, "--plan", files[1], "--output", files[2]]) == 0

    scores = simdiff.score(model, text, progress=False, **SMALL)
    plan = simdiff.plan(scores, 2, model=model)
    pruned = simdiff.prune(model, plan, tmp_path / "functions")
    scores.save(tmp_path / "scores.json")
    theirs, ours = (read_json(path, SCHEMA) for path in (Path(files[0]), tmp_path / "scores.json"))
    assert content(theirs) == content(ours)
    from_command = simdiff.PruningPlan.load(Path(files[1]))
    assert content(plan.to_dict()) == content(from_command.to_dict())
    for file in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        theirs_path, path = Path(files[2], file), pruned / file
        assert theirs_path.exists() == path.exists(), file
        assert not path.exists() or theirs_path.read_bytes() == path.read_bytes(), file
    again = simdiff.plan(files[0], 2, model=model)
    assert content(plan.to_dict()) == content(again.to_dict())


def test_an_object_gives_what_its_name_gives(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    model = loaded(tiny_checkpoint)
    scores = simdiff.score(model, tiny_text, progress=False, **SMALL)
    assert (
        scores.metrics == simdiff.score(tiny_checkpoint, tiny_text, progress=False, **SMALL).metrics
    )
    plan = simdiff.plan(scores, 2, model=model)
    directory = simdiff.prune(model, plan, tmp_path / "pruned")
    assert len(model.model.layers) == 6  # only the files are cut
    tokens = torch.arange(1, 9)[None]
    in_memory = simdiff.prune(model, plan)
    assert in_memory is model
    assert len(model.model.layers) == 4
    with torch.inference_mode():
        assert torch.equal(loaded(directory)(tokens).logits, model(tokens).logits)
    AutoTokenizer.from_pretrained(directory)  # went along
    assert (directory / "README.md").exists()


def test_documents_in_memory_are_as_good_as_a_file(tiny_checkpoint: Path, tiny_text: Path) -> None:
    documents = tiny_text.read_text().split("\n\n")
    from_list = simdiff.score(tiny_checkpoint, documents, progress=False, **SMALL)
    lines = tiny_text.with_suffix(".jsonl")
    lines.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    assert (
        from_list.metrics == simdiff.score(tiny_checkpoint, lines, progress=False, **SMALL).metrics
    )
    assert from_list.calibration["source"].startswith("documents in memory, sha256 ")
    with pytest.raises(simdiff.SimdiffError, match="cannot be read again"):
        simdiff.plan(from_list, 2, model=tiny_checkpoint)
    tokens = torch.randint(1, 90, (2, 16), generator=torch.Generator().manual_seed(3))
    assert simdiff.plan(from_list, 2, model=tiny_checkpoint, windows=tokens).candidates
    with pytest.raises(simdiff.SimdiffError, match="strings, got int at 1"):
        simdiff.score(tiny_checkpoint, ["w1 w2", 3], progress=False)  # type: ignore[list-item]
    with pytest.raises(simdiff.SimdiffError, match="got 2 documents of none"):
        simdiff.score(tiny_checkpoint, ["", "  "], progress=False)


def test_tokens_need_no_tokenizer_and_text_does(
    llama: PreTrainedModel, tiny_checkpoint: Path, tiny_text: Path
) -> None:
    tokens = torch.randint(1, 90, (4, 16), generator=torch.Generator().manual_seed(3))
    scores = simdiff.score(llama, tokens, batch_size=3, progress=False)
    assert scores.num_tokens == 64
    with pytest.raises(simdiff.SimdiffError, match="give tokenizer="):
        simdiff.score(llama, tiny_text, progress=False)
    with pytest.raises(simdiff.SimdiffError, match="must name their calibration text"):
        simdiff.plan(scores, 2, model=tiny_checkpoint)


def test_plans_and_scores_of_another_model_are_refused(
    llama: PreTrainedModel, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tokens = torch.randint(1, 90, (2, 16), generator=torch.Generator().manual_seed(3))
    scores = simdiff.score(llama, tokens, progress=False)
    plan = simdiff.plan(scores, 5)
    simdiff.prune(llama, plan)
    for output in (None, tmp_path / "new"):
        with pytest.raises(simdiff.SimdiffError, match="made for another model"):
            simdiff.prune(llama, plan, output)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()
    with pytest.raises(simdiff.SimdiffError, match="made for another model"):
        simdiff.plan(scores, 2, model=llama, windows=tokens)


def test_evaluate_takes_objects_and_names(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quality.json"
    flags = ("--text", str(tiny_text), "--num-windows", "4", "--window-length", "16")
    model = loaded(tiny_checkpoint)
    scores = simdiff.score(model, tiny_text, progress=False, **SMALL)
    small = simdiff.prune(model, simdiff.plan(scores, 2), tmp_path / "small")
    assert main(["eval", str(tiny_checkpoint), str(small), *flags, "--output", str(out)]) == 0
    by_command = json.loads(out.read_text())["models"]
    windows = {"num_windows": 4, "window_length": 16}
    named = simdiff.evaluate([tiny_checkpoint, small], tiny_text, **windows)
    objects = simdiff.evaluate([model, loaded(small)], tiny_text, **windows)
    for values, ours, theirs in zip(by_command.values(), named.models, objects.models, strict=True):
        assert values["perplexity"] == ours.perplexity.perplexity == theirs.perplexity.perplexity
    alone = simdiff.evaluate(model, tiny_text, **windows)
    assert [m.perplexity for m in alone.models] == [named.dense.perplexity]
    with pytest.raises(simdiff.SimdiffError, match="text, tasks or both"):
        simdiff.evaluate(model, None)


def test_recover_is_the_command(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    model = loaded(tiny_checkpoint)
    plan = simdiff.plan(simdiff.score(model, tiny_text, progress=False, **SMALL), 2)
    plan.save(tmp_path / "plan.json")
    command = [
        "recover",
        str(tiny_checkpoint),
        "--plan",
        str(tmp_path / "plan.json"),
        "--text",
        str(tiny_text),
        *FLAGS,
        "--output",
        str(tmp_path / "by_command"),
    ]
    assert main(command) == 0
    record = simdiff.recover(model, plan, tmp_path / "by_function", tiny_text, **SMALL)
    ours, theirs = (loaded(tmp_path / name) for name in ("by_function", "by_command"))
    assert set(record.changed) <= {name for name, _ in ours.named_parameters()}
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert record.perplexity("recovered") > 0
    assert len(model.model.layers) == 6
    with pytest.raises(simdiff.SimdiffError, match="another method"):
        simdiff.recover(model, plan, tmp_path / "no", tiny_text, learning_rate=1.0, **SMALL)
    assert not (tmp_path / "no").exists()


def test_input_is_refused_before_a_model_is_loaded(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.arange(1, 33).view(2, 16)
    plan = simdiff.plan(simdiff.score(tiny_checkpoint, tokens, progress=False), 2)
    for module in ("simdiff.jobs.inputs", "simdiff.jobs.recover"):
        monkeypatch.setattr(f"{module}.load_model", lambda *a, **k: pytest.fail("loaded"))
    for bad in (tokens[0], tokens[:0], tokens.float()):
        with pytest.raises(simdiff.SimdiffError, match=r"integers \(num_windows, window_length\)"):
            simdiff.score(tiny_checkpoint, bad, progress=False)
    with pytest.raises(simdiff.SimdiffError, match="below the window length 16, got 16"):
        simdiff.score(tiny_checkpoint, tokens, skip_leading=16, progress=False)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.tex").write_text("precious")
    with pytest.raises(simdiff.SimdiffError, match="must not exist yet"):
        simdiff.recover(tiny_checkpoint, plan, tmp_path / "there", "demo")
    with pytest.raises(simdiff.SimdiffError, match="method must be one of"):
        simdiff.recover(tiny_checkpoint, plan, tmp_path / "new", "demo", method="magic")


def test_what_is_no_value_of_an_argument_is_refused_in_words_of_python(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny_checkpoint, torch.arange(1, 33).view(2, 16)
    scores = simdiff.score(model, tokens, progress=False)
    object_of = loaded(model)
    wanted: dict[str, Callable[[], object]] = {
        "dtype must be one of auto, float32, bfloat16, float16, got 'int8'": lambda: simdiff.score(
            model, tokens, dtype="int8"
        ),
        "got torch.float16": lambda: simdiff.score(model, tokens, dtype=torch.float16),  # type: ignore[arg-type]
        "score: batch_size must be at least 1, got 0": lambda: simdiff.score(
            model, tokens, batch_size=0
        ),
        "text: must be a file, a folder, 'demo' or a list of documents, got int": (
            lambda: simdiff.score(model, 3)  # type: ignore[arg-type]
        ),
        "must be 1 to 5 of 6, got '2'": lambda: simdiff.plan(scores, "2"),  # type: ignore[arg-type]
        "must be 1 to 5 of 6, got 2.0": lambda: simdiff.plan(scores, 2.0),  # type: ignore[arg-type]
        "effort has an effect only with model=...": lambda: simdiff.plan(scores, 2, effort="quick"),
        "a plan must be a PruningPlan, a file, or layers such as [2, 3], got int": (
            lambda: simdiff.prune(model, 3, tmp_path / "no")  # type: ignore[call-overload]
        ),
        "models must be at least one": lambda: simdiff.evaluate([], "demo"),
        "a model must be an object of transformers, got str": lambda: simdiff.bench(
            str(model),  # type: ignore[arg-type]
            object_of,
        ),
    }
    for told, call in wanted.items():
        with pytest.raises(simdiff.SimdiffError) as refusal:
            call()
        assert told in str(refusal.value)
        assert "--" not in str(refusal.value)
    monkeypatch.setattr("simdiff.api.evaluate_models", lambda *given, tasks, **more: tasks)
    found: Any = simdiff.evaluate(model, tasks="piqa")
    assert found.names == ("piqa",), "one name, and not its letters"


def test_scores_of_sublayers_and_without_leading_tokens(tiny_checkpoint: Path) -> None:
    tokens = torch.randint(1, 90, (4, 16), generator=torch.Generator().manual_seed(3))
    assert simdiff.score(tiny_checkpoint, tokens, sublayers=True, progress=False).sublayers
    skipped = simdiff.score(tiny_checkpoint, tokens, skip_leading=2, progress=False)
    assert (skipped.num_tokens, skipped.leading.num_tokens) == (4 * 14, 4 * 2)
    with pytest.raises(simdiff.SimdiffError, match="sub-layers are scored over all tokens"):
        simdiff.score(tiny_checkpoint, tokens, sublayers=True, skip_leading=2, progress=False)
