"""`simdiff recover`: a stock checkpoint that verifies, says what was changed, and never lies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from simdiff.data.text import token_windows
from simdiff.errors import SimdiffError
from simdiff.jobs.recover import check_recoverable, recovered
from simdiff.models.identity import model_identity
from simdiff.models.loading import load_model
from simdiff.planning.plan import PruningPlan
from simdiff.provenance.verify import Check, verify
from simdiff.recovery.record import RECORD, RecoveryRecord
from simdiff.report.page import report_page
from simdiff.surgery.copies import sharing_copy
from support.commands import simdiff
from support.own_text import decided, drawn
from support.plans import plan_for

SMALL = ("--num-windows", "64", "--window-length", "32")


REMOVED = (4, 1)


def plan_of(model: PreTrainedModel) -> PruningPlan:
    return plan_for(6, REMOVED, **model_identity(model, "tiny"))


@pytest.fixture
def llama(llama: PreTrainedModel) -> PreTrainedModel:
    return decided(llama, 6)


@pytest.fixture
def tiny_checkpoint(tiny_checkpoint: Path, llama: PreTrainedModel) -> Path:
    llama.save_pretrained(tiny_checkpoint)
    return tiny_checkpoint


def write_text(path: Path, model: PreTrainedModel) -> None:
    rows = drawn(model, 160, 32).tolist()
    words = (" ".join(f"w{n}" if n else "<unk>" for n in row) for row in rows)
    path.write_text("\n\n".join(words))


@pytest.fixture
def tiny_text(llama: PreTrainedModel, tmp_path: Path) -> Path:
    write_text(tmp_path / "own-text.txt", llama)
    return tmp_path / "own-text.txt"


@pytest.fixture
def plan_file(llama: PreTrainedModel, tmp_path: Path) -> Path:
    path = tmp_path / "the-plan.json"
    plan_of(llama).save(path)
    return path


def faults(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.detail for check in checks if check.passed is False}


@pytest.fixture
def directory(tiny_checkpoint: Path, plan_file: Path, tiny_text: Path, tmp_path: Path) -> Path:
    out = tmp_path / "recovered"
    command = ("recover", tiny_checkpoint, "--plan", plan_file, "--text", tiny_text, *SMALL)
    assert simdiff(*command, "-o", out) == 0
    return out


def test_the_checkpoint_is_stock_and_verifies(
    directory: Path, tiny_checkpoint: Path, tiny_text: Path, llama: PreTrainedModel
) -> None:
    record = RecoveryRecord.load(directory / RECORD)
    checks = verify(directory, str(tiny_checkpoint))
    assert faults(checks) == {}
    assert record.perplexity("recovered") < 0.95 * record.perplexity("pruned")
    details = {check.name: check.detail for check in checks}
    assert details["recovery"].startswith("closed-form: ")
    assert details["equals the plan applied to the original"].endswith("exactly")
    page = (directory / "report.html").read_text()
    assert page == report_page(directory)
    assert f"{record.perplexity('recovered'):.2f}" in page
    card = (directory / "README.md").read_text()
    assert "nothing was trained afterwards" not in card
    assert f"| this model | {record.perplexity('recovered'):.2f} |" in card
    assert "simdiff recover " in card
    # What stock classes load gives bitwise the logits of the model in memory.
    model, tokenizer = load_model(str(tiny_checkpoint))
    parts = [
        token_windows(str(tiny_text), tokenizer, part=part, num_windows=64, window_length=32)
        for part in ("calibration", "held-out")
    ]
    ours, again = recovered(model, plan_of(llama), *parts, method="closed-form")
    assert again.changed == record.changed
    assert again.quality == record.quality
    theirs = AutoModelForCausalLM.from_pretrained(directory).eval().to(ours.device)
    ids = parts[1].tokens.to(ours.device)
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, ours(input_ids=ids).logits)


def test_the_plan_that_is_best_once_repaired(
    tiny_checkpoint: Path, llama: PreTrainedModel, tiny_text: Path, tmp_path: Path, capsys
) -> None:
    """Of the plans that the search evaluated; plan.json and the record say which it was."""
    plans = [(4, 1), (2, 3)]
    rows = tuple({"removed": list(p), "nll": 1.0, "num_windows": 1} for p in plans)
    file, out = tmp_path / "searched.json", tmp_path / "recovered"
    replace(plan_of(llama), candidates=rows).save(file)
    command = ("recover", tiny_checkpoint, "--plan", file, "--text", tiny_text, *SMALL, "-o", out)
    assert simdiff(*command, "--choose", "1") == 2
    assert "choose must be at least 2 plans, got 1" in capsys.readouterr().err
    assert simdiff(*command, "--choose", "2") == 0
    tried = RecoveryRecord.load(out / RECORD).details["plans"]
    assert [tuple(one["removed"]) for one in tried] == plans
    best = min(tried, key=lambda one: one["nll"])
    plan = PruningPlan.load(out / "plan.json")
    assert list(plan.removed) == best["removed"]
    assert "chosen among 2 plans of the search" in plan.notes[-1]
    assert faults(verify(out, str(tiny_checkpoint))) == {}


def damage(directory: Path, name: str) -> None:
    weights = load_file(directory / "model.safetensors")
    weights[name][1, 2] += 0.25
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def test_damage_is_found(directory: Path, tiny_checkpoint: Path) -> None:
    record = RecoveryRecord.load(directory / RECORD)
    kept = "model.layers.0.mlp.up_proj.weight"
    assert kept not in record.changed
    (changed, *_) = record.changed
    damage(directory, changed)
    found = faults(verify(directory))
    assert list(found) == ["recovery"]
    assert changed in found["recovery"]
    damage(directory, kept)
    found = faults(verify(directory, str(tiny_checkpoint)))
    assert kept in found["equals the plan applied to the original"]
    content = json.loads((directory / RECORD).read_text())
    content["changed"][kept] = "0" * 64
    (directory / RECORD).write_text(json.dumps(content))
    assert "2 of" in faults(verify(directory))["recovery"]
    (directory / RECORD).write_text("{")
    assert "not JSON" in faults(verify(directory))["recovery"]


def test_bad_input(
    tiny_checkpoint: Path, plan_file: Path, tiny_text: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"

    def refused(words: str, *options: object, plan: Path = plan_file) -> None:
        command = ("recover", tiny_checkpoint, "--plan", plan, "--text", tiny_text, *SMALL)
        assert simdiff(*command, "-o", out, *options) == 2
        assert words in capsys.readouterr().err
        assert not out.exists()

    content = json.loads(plan_file.read_text())
    nothing, other = tmp_path / "nothing.json", tmp_path / "other.json"
    nothing.write_text(json.dumps(content | {"removed": [], "kept": list(range(6))}))
    refused("removed must name 1 to 5 layers", plan=nothing)
    model = content["model"] | {"fingerprint": "0", "hidden_size": 64, "name": "large"}
    other.write_text(json.dumps(content | {"model": model}))
    refused("the plan was made for another model, 'large': hidden_size 64 against 32", plan=other)
    refused("at least 2 windows of text", "--num-windows", "1")
    refused("must fill one window of 4096 tokens", "--window-length", "4096")
    refused("batch-size must be at least 1, got 0", "--batch-size", "0")
    weights = load_file(tiny_checkpoint / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, tiny_checkpoint / "model.safetensors", metadata={"format": "pt"})
    refused("the loss must be finite")


def test_harm_is_said(
    tiny_checkpoint: Path,
    plan_file: Path,
    tiny_text: Path,
    tmp_path: Path,
    llama: PreTrainedModel,
    capsys,
) -> None:
    """Text drawn from the plain cut is predicted best by the plain cut."""
    other, out = tmp_path / "other.txt", tmp_path / "out"
    write_text(other, sharing_copy(llama, REMOVED))
    command = ("recover", tiny_checkpoint, "--plan", plan_file, "--text", tiny_text, *SMALL)
    assert simdiff(*command, "--held-out", other, "--json", "-o", out) == 0
    content = json.loads(capsys.readouterr().out)
    quality = {stage: values["perplexity"] for stage, values in content["quality"].items()}
    assert quality["recovered"] > quality["pruned"], "else this test tests nothing"
    words = "recovery made it worse: held-out perplexity"
    assert any(note.startswith(words) for note in content["notes"])
    card = (out / "README.md").read_text()
    assert f"**Note**: `{words}" in card
    assert f"--held-out {other}" in card
    assert content["evaluation"]["part"] == "all"


def test_quantised_models_are_refused(llama: PreTrainedModel) -> None:
    llama.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(SimdiffError, match="floating point, got a quantised model"):
        check_recoverable(llama)
