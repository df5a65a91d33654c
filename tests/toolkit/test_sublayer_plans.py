"""Plans of sub-layers: chosen, kept in files, applied in memory; refused where files are cut."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from test_families import token_ids
from transformers import PreTrainedModel

from simdiff.cli import main
from simdiff.criteria import CRITERIA
from simdiff.errors import SimdiffError
from simdiff.evaluation import perplexity
from simdiff.models import load_model
from simdiff.plan_kinds import cut_in_memory, load_any_plan
from simdiff.scores import LayerScores
from simdiff.selection import PruningPlan
from simdiff.sublayer_plans import NOT_OF_SUBLAYERS, SublayerPlan, plan_sublayers
from simdiff.sublayer_scores import SublayerScores, score_with_sublayers
from simdiff.sublayer_surgery import removed_sublayers
from simdiff.sublayers import SublayerName


@pytest.fixture
def scores(llama: PreTrainedModel) -> LayerScores:
    return score_with_sublayers(llama, [token_ids()], name="tiny", progress=False)


def lowest(values: dict[SublayerName, float], count: int) -> tuple[SublayerName, ...]:
    return tuple(sorted(values, key=lambda name: values[name])[:count])


@pytest.mark.parametrize("unit", ["attention", "mlp", "sublayer"])
def test_the_lowest_go(scores: LayerScores, unit: str) -> None:
    table = SublayerScores.of(scores)
    squashed = {
        name: 0.3 / (1 + math.exp(-table.metrics["absolute_difference"].mean[row]))
        + 0.7 * table.metrics["cosine_distance"].mean[row] / 2
        for row, name in enumerate(table.names)
    }
    own = {
        "block-influence": dict(
            zip(table.names, table.metrics["cosine_distance"].mean, strict=True)
        ),
        "relative-magnitude": dict(
            zip(table.names, table.metrics["relative_difference"].mean, strict=True)
        ),
        "simdiff": {
            name: table.metrics["cosine_distance"].mean[row] + table.norm_change[row]
            for row, name in enumerate(table.names)
        },
        "simdiff-masd": squashed,
    }
    for criterion, values in own.items():
        values = {name: v for name, v in values.items() if unit in ("sublayer", name.kind)}
        plan = plan_sublayers(scores, unit, 4, criterion=criterion, alpha=0.3)
        assert plan.removed == lowest(values, 4), criterion
        assert plan.importance == pytest.approx(sorted(values.values()))
        free = {name: v for name, v in values.items() if name.layer not in (1, 2)}
        plan = plan_sublayers(scores, unit, 3, criterion=criterion, alpha=0.3, protect=(1, 2))
        assert plan.removed == lowest(free, 3)


def test_every_criterion_of_single_units(scores: LayerScores, tmp_path: Path) -> None:
    for criterion in CRITERIA:
        if criterion in NOT_OF_SUBLAYERS:
            with pytest.raises(SimdiffError, match="not defined for sub-layers"):
                plan_sublayers(scores, "mlp", 2, criterion=criterion)
            continue
        plan = plan_sublayers(scores, "sublayer", 3, criterion=criterion)
        plan.save(tmp_path / "plan.json")
        assert load_any_plan(tmp_path / "plan.json") == plan


def test_files_of_scores(scores: LayerScores, llama_scores: LayerScores, tmp_path: Path) -> None:
    scores.save(tmp_path / "new.json")
    again = LayerScores.load(tmp_path / "new.json")
    assert SublayerScores.of(again) == SublayerScores.of(scores)
    llama_scores.save(tmp_path / "old.json")  # as before there were sub-layers
    assert "sublayers" not in json.loads((tmp_path / "old.json").read_text())
    old = LayerScores.load(tmp_path / "old.json")
    assert old == llama_scores
    with pytest.raises(SimdiffError, match="score the model again with `simdiff score --subl"):
        plan_sublayers(old, "mlp", 2)
    content = SublayerScores.of(scores).to_dict()
    for damage in (
        {"norm_change": content["norm_change"][1:]},
        {"names": content["names"][2:]},
        {"names": [[0, "norm"], *content["names"][1:]]},
        {"metrics": {}},
    ):
        with pytest.raises(SimdiffError, match="of sub-layers must hold finite values.*damaged"):
            SublayerScores.of(replace(scores, sublayers={**content, **damage}))


def test_layers_are_scored_as_without(scores: LayerScores, llama: PreTrainedModel) -> None:
    from simdiff.scores import score

    plain = score(llama, [token_ids()], name="tiny", progress=False)
    assert replace(scores, sublayers=None) == plain


def test_damaged_plans(scores: LayerScores, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan_sublayers(scores, "attention", 2).save(path)
    content = json.loads(path.read_text())
    for damage in (
        {"removed": []},
        {"removed": [[0, "mlp"]]},
        {"removed": [[6, "attention"]]},
        {"unit": "head"},
        {"sublayers": content["sublayers"] + content["sublayers"][:1]},
        {"notes": None},
    ):
        path.write_text(json.dumps({**content, **damage}))
        with pytest.raises(SimdiffError, match="complete plan of sub-layers, but is damaged"):
            SublayerPlan.load(path)


@pytest.mark.parametrize(
    ("unit", "count", "wanted"),
    [("head", 1, "attention, mlp, sublayer, got 'head'"), ("mlp", 0, "got 0"),
     ("sublayer", 12, "got 12")],
)  # fmt: skip
def test_bad_plans(scores: LayerScores, unit: str, count: int, wanted: str) -> None:
    with pytest.raises(SimdiffError, match=wanted):
        plan_sublayers(scores, unit, count)


def test_from_scores_to_perplexity(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, and the same by hand; where files are cut such a plan is refused."""
    scores, plan = str(tmp_path / "scores.json"), str(tmp_path / "plan.json")
    model, text = str(tiny_checkpoint), ["--text", str(tiny_text), "--window-length", "20"]
    text += ["--windows", "4"]
    assert main(["score", model, *text, "--sublayers", "-o", scores]) == 0
    assert "attention 3" in capsys.readouterr().out
    chosen = ["plan", scores, "--unit", "sublayer", "-o", plan]
    assert main([*chosen, "--num-layers", "4"]) == 0
    assert "REMOVE: rank 1 of 12" in capsys.readouterr().out
    assert main(["eval", model, *text, "--plan", plan, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    dense, pruned = results["models"].values()
    loaded, tokenizer = load_model(model)
    removed = SublayerPlan.load(Path(plan)).removed
    assert results["removed"] == [str(name) for name in removed]
    from simdiff.calibration import token_windows

    windows = token_windows(
        str(tiny_text), tokenizer, part="held-out", num_windows=4, window_length=20
    ).tokens
    by_hand = perplexity(loaded, windows).perplexity
    assert dense["perplexity"] == pytest.approx(by_hand, rel=1e-6)
    with removed_sublayers(loaded, removed):
        by_hand = perplexity(loaded, windows).perplexity
    assert pruned["perplexity"] == pytest.approx(by_hand, rel=1e-6)
    assert dense["perplexity"] != pruned["perplexity"]

    for command in (
        ["prune", model, "--plan", plan, "-o", str(tmp_path / "out")],
        ["export", plan, "--format", "list"],
    ):
        assert main(command) == 2
        assert "no config of a checkpoint says that one is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*chosen, "--overwrite", "--ratio", "0.5"]) == 2
    assert "must go with --num-layers" in capsys.readouterr().err


def test_plans_of_layers_in_memory(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, plan, small = (str(tmp_path / name) for name in ("s.json", "p.json", "small"))
    model, text = str(tiny_checkpoint), ["--text", str(tiny_text), "--window-length", "20"]
    text += ["--windows", "4"]
    assert main(["score", model, *text, "-o", scores]) == 0
    assert main(["plan", scores, "--num-layers", "2", "-o", plan]) == 0
    assert main(["prune", model, "--plan", plan, "-o", small]) == 0
    capsys.readouterr()
    assert main(["eval", model, *text, "--plan", plan, "--json"]) == 0
    in_memory = [*json.loads(capsys.readouterr().out)["models"].values()]
    assert main(["eval", model, small, *text, "--json"]) == 0
    from_files = [*json.loads(capsys.readouterr().out)["models"].values()]
    assert in_memory == from_files
    assert isinstance(load_any_plan(Path(plan)), PruningPlan)
    assert main(["eval", model, model, *text, "--plan", plan]) == 2
    assert "--plan goes with one model, got 2" in capsys.readouterr().err


def test_plans_for_another_model(scores: LayerScores, llama: PreTrainedModel) -> None:
    plan = plan_sublayers(scores, "mlp", 2)
    other = replace(plan, model={**plan.model, "fingerprint": "other"})
    with pytest.raises(SimdiffError, match="another model"), cut_in_memory(llama, other):
        pass
