"""Files of a run, an evaluation and a recovery of the tiny model, as their commands write them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from simdiff.io.json_files import header, write_json
from simdiff.planning.make_plan import make_plan
from simdiff.planning.plan import PruningPlan
from simdiff.report.sources import pruned_parameters
from simdiff.scoring.scores import LayerScores

NAME = 'tiny <b>"&amp;'


def write_run(directory: Path, scores: LayerScores) -> PruningPlan:
    """scores.json, plan.json and results.json of a run that removed two layers."""
    directory.mkdir()
    scores.save(directory / "scores.json")
    plan = make_plan(scores, 2, protect=(0,))
    plan.save(directory / "plan.json")
    write_json(directory / "results.json", results(plan))
    return plan


def results(plan: PruningPlan) -> dict[str, Any]:
    """The content of results.json."""
    speed = {
        "prompt_tokens": 16,
        "new_tokens": 8,
        "repeats": 5,
        "num_threads": 1,
        "device": "cuda:0",
        "decoding": "CUDA graph, static cache",
    }
    faster = {"prefill": 1.3622, "decode": 1.2964}
    ideal = {"prefill": 1.4321, "decode": 1.3456}
    share = {"prefill": 0.9512, "decode": 0.9634}
    return {
        **header("simdiff.results"),
        "machine": "a machine",
        "evaluation": {
            "source": "text",
            "num_windows": 4,
            "window_length": 16,
            "num_predicted_tokens": 60,
        },
        "dense": quality(30.25)
        | {
            "num_parameters": plan.model["num_parameters"],
            "speed": {"prefill": 811.5, "decode": 52.5, **speed},
        },
        "pruned": quality(44.75)
        | {
            "num_parameters": pruned_parameters(plan),
            "speed": {
                "prefill": 1105.5,
                "decode": 68.1,
                **speed,
                "ideal": ideal,
                "share_of_ideal": share,
                "times_faster": faster,
            },
            "generation": {"prompt": "Once <i>", "text": " upon & a time", "equals_uncached": True},
        },
    }


def quality(perplexity: float) -> dict[str, Any]:
    """Fields of `simdiff.evaluation.window_perplexity.Perplexity`."""
    return {
        "perplexity": perplexity,
        "nll": math.log(perplexity),
        "standard_error": 0.05,
        "low": 0.91 * perplexity,
        "high": 1.12 * perplexity,
    }


def evaluation(plan: PruningPlan) -> dict[str, Any]:
    """Schema simdiff.evaluation, of `simdiff eval --output`."""

    def model(size: int | None, perplexity: float, accuracy: float, kept: float) -> dict[str, Any]:
        average = {
            "tasks": ["piqa"],
            "average": accuracy,
            "standard_error": 0.0124,
            "retained": kept,
            "retained_error": 0.0233,
        }
        task = {
            "metric": "acc_norm",
            "value": accuracy,
            "standard_error": 0.0146,
            "chance": 0.5,
            "difference": {"value": accuracy - 0.7012, "standard_error": 0.0101},
        }
        return quality(perplexity) | {
            "num_parameters": size,
            "low": perplexity - 1.5,
            "high": perplexity + 1.5,
            "against_dense": {"ratio": perplexity / 30.5, "low": 1.111, "high": 1.999},
            "tasks": {
                "piqa": task | {"at_chance": False},
                "rte": task | {"at_chance": True, "value": 0.5123},
                "trivia": task | {"at_chance": False, "value": 0.2222, "chance": 0.0},
            },
            "averages": {
                "classification": {
                    "all_tasks": average | {"tasks": ["piqa", "rte"]},
                    "above_chance": average,
                },
                "generation": dict.fromkeys(
                    ("all_tasks", "above_chance"),
                    average | {"tasks": ["trivia"], "retained": kept**5},
                ),
            },
        }

    return {
        **header("simdiff.evaluation"),
        "machine": "a machine",
        "dense": NAME,
        "models": {
            NAME: model(plan.model["num_parameters"], 30.5, 0.7012, 1.0),
            "out/model": model(pruned_parameters(plan), 45.5, 0.6349, 0.9049),
        },
        "notes": ["rte: left out of the average without tasks at chance"],
    }


def recovery() -> dict[str, Any]:
    """recovery.json of fine-tuning that started from a closed-form correction."""
    curve = [
        {
            "step": step,
            "tokens": 1000 * step,
            "seconds": 12.5 * step,
            "learning_rate": 1e-3,
            "train_loss": 4.9 - 0.01 * step if step else None,
            "set_apart_loss": 4.8 - 0.011 * step,
        }
        for step in (0, 10, 20, 30)
    ]
    layers = [
        {
            "layer": 3,
            "projection": "mlp.down_proj",
            "relative_error": 0.4321,
            "parts": [
                {"modules": ["attn.q", "attn.k"], "strength": 0.1, "relative_error": 0.87654}
            ],
        },
        {"layer": 5, "projection": None, "relative_error": None},
    ]
    losses = [{"corrected": 0, "nll": 4.91}, {"corrected": 2, "nll": 4.5678}]
    return {
        **header("simdiff.recovery"),
        "method": "lora",
        "formula": "W + (alpha / rank) B A",
        "settings": {"rank": 8},
        "quality": {"dense": quality(30.25), "pruned": quality(44.75), "recovered": quality(36.5)},
        "recovered_share": 0.5203,
        "seconds": 375.0,
        "machine": "a machine",
        "notes": ["stopped early"],
        "details": {
            "training": {"best_step": 30, "stopped": "all steps were done", "curve": curve},
            "start": {"layers": layers, "losses": losses, "corrected": 2},
        },
    }
