"""Commands that need neither torch nor transformers do not load them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from simdiff.scoring.calibration_pass import score
from simdiff.sublayers.scores import score_with_sublayers
from support.gguf_models import write_gguf
from support.plans import plan_for
from support.tiny_models import make_tiny

CODE = """\
import sys
from simdiff import cli
try:
    code = cli.main(sys.argv[1:])
except SystemExit as caught:
    code = caught.code
loaded = {"torch", "transformers"} & set(sys.modules)
if loaded:
    sys.exit(f"loaded {loaded}")
sys.exit(code)
"""


def run_without(*arguments: object) -> str:
    """Run a command in a process of its own; returns what it printed."""
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of layers and of sub-layers of a tiny model."""
    folder = tmp_path_factory.mktemp("startup")
    tokens = torch.randint(1, 90, (4, 16), generator=torch.Generator().manual_seed(3))
    model = make_tiny("llama")
    score(model, [tokens], name="tiny", progress=False).save(folder / "scores.json")
    found = score_with_sublayers(model, [tokens], name="tiny", progress=False)
    found.save(folder / "sublayers.json")
    plan_for(6, (1, 2)).save(folder / "plan.json")
    return folder


@pytest.mark.parametrize("words", [("--help",), ("run", "--help"), ("recover", "--help-all")])
def test_help(words: tuple[str, ...]) -> None:
    assert "usage: simdiff" in run_without(*words)


def test_info_loads_torch_and_nothing_else() -> None:
    """What works is known only when the compiled modules are loaded, which need torch."""
    code = CODE.replace('{"torch", "transformers"}', '{"transformers", "triton", "gguf"}')
    command = [sys.executable, "-c", code, "info"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert 11 <= len(lines) <= 16
    assert [line.split()[0] for line in lines[5:9]] == ["reference", "cpu", "triton", "cuda"]
    assert lines[6].split()[1] == "works"
    assert f"transformers {transformers.__version__}" in lines[3]
    assert lines[-1] == "A bug report needs these lines."


def test_a_closed_standard_output_is_no_error(files: Path, tmp_path: Path) -> None:
    code = "import sys; sys.stdout = sys.stderr = None\n" + CODE
    words = ["plan", files / "scores.json", "--num-layers", 2, "--bootstrap", 0]
    command = [sys.executable, "-c", code, *map(str, words), "-o", str(tmp_path / "p.json")]
    assert subprocess.run(command).returncode == 0
    assert (tmp_path / "p.json").exists()


def test_plan_from_scores(files: Path, tmp_path: Path) -> None:
    """With the bootstrap, which is the slowest part of it."""
    run_without("plan", files / "scores.json", "--num-layers", 2, "-o", tmp_path / "p.json")
    plan = json.loads((tmp_path / "p.json").read_text())
    assert len(plan["removed"]) == 2
    assert plan["confidence"]["num_resamples"] == 500


def test_plan_of_sublayers(files: Path, tmp_path: Path) -> None:
    words = ("--unit", "attention", "--num-layers", 2, "-o", tmp_path / "p.json")
    run_without("plan", files / "sublayers.json", *words)
    assert (tmp_path / "p.json").exists()


def test_export(files: Path) -> None:
    text = run_without("export", files / "plan.json", "--format", "mergekit", "--model", "org/m")
    assert "merge_method: passthrough" in text


def test_report(files: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    for name in ("scores.json", "plan.json"):
        (directory / name).write_bytes((files / name).read_bytes())
    run_without("report", directory, "-o", tmp_path / "report.html")
    assert "</html>" in (tmp_path / "report.html").read_text()


def test_prune_of_a_gguf_file(files: Path, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf")
    run_without("prune", source, "--plan", files / "plan.json", "-o", tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").exists()


def test_refusals_load_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, "plan", str(tmp_path / "none.json"), "-o", "p.json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "No such file" in result.stderr
    assert "loaded" not in result.stderr


def test_the_names_of_the_kernels_need_no_torch() -> None:
    code = (
        "import sys, simdiff_kernels as sk\n"
        "assert sk.METRICS and sk.BLOCK_METRICS and sk.BACKENDS\n"
        "assert set(sk.__all__) <= set(dir(sk))\n"
        "assert 'torch' not in sys.modules\n"
        "assert sk.metrics.METRICS is sk.METRICS and sk.ops.METRICS is sk.METRICS\n"
        "for name in sk.__all__: getattr(sk, name)\n"
        "assert sk.token_metrics is sk.ops.token_metrics and 'torch' in sys.modules\n"
        "try: sk.scored\n"
        "except AttributeError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "no attribute 'scored'" in result.stdout
