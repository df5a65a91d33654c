"""The examples run, and what they print is right."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import simdiff
from simdiff.models.loading import load_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def flags(tiny_checkpoint: Path, tiny_text: Path) -> list[str]:
    return [
        "--model",
        str(tiny_checkpoint),
        "--text",
        str(tiny_text),
        "--windows",
        "3",
        "--window-length",
        "16",
    ]


def test_replaced_loops_give_the_same_numbers(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    differences = example("replace_scoring_loop").main([*flags, "--block", "2"])
    assert set(differences) == {"block influence", "angular distance", "cosine of blocks"}
    assert max(differences.values()) < 1e-6
    assert capsys.readouterr().out.count("same order: True") == 3


def test_the_pruning_loop_removes_what_it_scores_lowest(
    flags: list[str], tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = example("pruning_loop")
    removed = loop.main([*flags, "--num-layers", "3"])
    assert len(set(removed)) == 3
    assert capsys.readouterr().out.count("perplexity") == 4

    # Layer by layer in float64: the first to go is the one of the lowest importance.
    model, _ = load_model(str(tiny_checkpoint), dtype="float32", device="cpu")
    tokens = torch.randint(1, 90, (2, 16), generator=torch.Generator().manual_seed(3))
    summary = loop.score_layers(model, [tokens])
    with torch.inference_mode():
        states = model(tokens, output_hidden_states=True).hidden_states[:-1]
    for layer in range(len(states) - 1):
        x, y = states[layer].double(), states[layer + 1].double()
        cosine = 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1).mean()
        relative = ((y - x).norm(dim=-1) / x.norm(dim=-1)).mean()
        torch.testing.assert_close(summary["cosine_distance"].mean[layer], cosine)
        torch.testing.assert_close(summary["relative_difference"].mean[layer], relative)
    lowest = summary["cosine_distance"].mean + summary["relative_difference"].mean
    assert loop.least_important(summary) == int(lowest.argmin())


def test_the_whole_way(flags: list[str], tmp_path: Path) -> None:
    perplexities = example("prune_and_recover").main([*flags, "--output", str(tmp_path / "out")])
    for name in ("pruned", "recovered"):
        model, _ = load_model(str(tmp_path / "out" / name))
        assert model.config.num_hidden_layers == 5
    assert (tmp_path / "out" / "recovered" / "recovery.json").exists()
    assert list(perplexities) == ["dense", "pruned", "recovered"]
    assert all(90 < value < 110 for value in perplexities.values())  # 97 words, random weights


def test_ten_lines_of_hooks() -> None:
    hooks = example("torch_hooks")
    assert hooks.main().shape == (6,)
    torch.manual_seed(1)
    states, layers = torch.randn(2, 5, 8), torch.nn.Sequential(*(torch.nn.Tanh() for _ in range(2)))
    found = hooks.score_layers(list(layers), lambda: layers(states))["cosine_distance"].mean
    for layer in range(2):
        after = states.tanh()
        cosine = 1 - torch.cosine_similarity(states.double(), after.double(), dim=-1).mean()
        torch.testing.assert_close(found[layer], cosine, rtol=1e-6, atol=0)
        states = after
    assert not any(layer._forward_hooks for layer in layers)


def test_scores_while_a_trainer_trains(flags: list[str], tiny_checkpoint: Path) -> None:
    module = example("trainer_callback")
    history = module.main([*flags, "--steps", "8", "--windows", "12"])
    assert list(history) == [0, 2, 4, 6]
    assert history[0] != history[6], "weights have moved"
    # By hand, the numbers of one step are those of a calibration pass.
    model, _ = load_model(str(tiny_checkpoint), dtype="float32", device="cpu")
    tokens = torch.randint(1, 90, (2, 16), generator=torch.Generator().manual_seed(3))
    callback, state = module.LayerScores(every=2), SimpleNamespace(global_step=4)
    callback.on_step_begin(None, state, None, model=model)
    model(tokens)
    state.global_step = 5
    callback.on_step_end(None, state, None)
    model(tokens)
    wanted = simdiff.score(model, tokens).metrics["cosine_distance"].mean
    assert callback.history == {4: pytest.approx(list(wanted), rel=1e-6)}


def test_the_loop_of_a_peer_removes_the_same(flags: list[str]) -> None:
    theirs, ours = example("peer_loop").main([*flags, "--num-layers", "2"])
    assert theirs == ours
    assert len(ours) == 2


def test_the_notebook_runs_from_top_to_bottom(
    tiny_checkpoint: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its cells in order, on a tiny model: the last expression of a cell is what it shows."""
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), "kept without outputs"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    shown: list[object] = []
    for index, cell in enumerate(cell for cell in cells if cell["cell_type"] == "code"):
        body = ast.parse("".join(cell["source"])).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), "notebook", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "notebook", "eval"), names))
        if index == 0:
            assert (names["MODEL"], names["TEXT"]) == ("demo", "demo")
            small = {"num_windows": 4, "window_length": 16}
            names |= {"MODEL": tiny_checkpoint, "TEXT": tiny_text, "NUM_LAYERS": 2, "SIZE": small}
    printed = capsys.readouterr().out
    assert "4 layers" in printed
    assert printed.rstrip().endswith(" times")
    files, picture = (value for value in shown if value is not None)
    assert {"config.json", "model.safetensors", "plan.json"} <= {*files}
    assert picture._repr_svg_().count("<svg") == 1
