"""Budgets of a model whose layers differ, on numbers small enough for paper."""

from __future__ import annotations

import math

import pytest
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models.identity import model_identity
from simdiff.planning.budget import Budget, layers_for_ratio

# 200 parameters, of which 100 in layers: the smallest one, two, three are 10, 30, 60 of them.
MODEL = {
    "num_layers": 4,
    "num_parameters": 200,
    "embedding_parameters": 40,
    "layer_parameters": [40, 10, 30, 20],
    "dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [
        (Budget(), 1),  # a quarter
        (Budget(ratio=0.75), 3),
        (Budget(num_layers=2), 2),
        (Budget(parameter_ratio=10 / 200), 1),
        (Budget(parameter_ratio=0.051), 2),
        (Budget(parameter_ratio=30 / 200), 2),
        (Budget(parameter_ratio=60 / 200), 3),
        # A step reads 160 parameters, 150, 130 and 100 without one, two and three layers.
        (Budget(speed_up=160 / 150), 1),
        (Budget(speed_up=1.07), 2),
        (Budget(speed_up=160 / 130), 2),
        (Budget(speed_up=1.6), 3),
        # 400 bytes in bfloat16, and 380, 340, 280.
        (Budget(max_memory=399e-9), 1),
        (Budget(max_memory=380e-9), 1),
        (Budget(max_memory=379e-9), 2),
        (Budget(max_memory=280e-9), 3),
    ],
)
def test_fewest_layers_that_reach_it(budget: Budget, wanted: int) -> None:
    assert budget.layers(MODEL) == wanted


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            Budget(parameter_ratio=0.31),
            "removing 3 of 4 layers must remove 0.31 of the parameters, but it reaches only 0.3",
        ),
        (Budget(num_layers=1, ratio=0.5), "one of its kinds, got num_layers, ratio"),
        (Budget(speed_up=1.0), "speed_up must be above 1, got 1.0"),
        (Budget(parameter_ratio=0.0), "above 0 and below 1, got 0.0"),
        (Budget(parameter_ratio=1.0), "above 0 and below 1, got 1.0"),
        (
            Budget(speed_up=1.61),
            "removing 3 of 4 layers must decode 1.61 times faster, but it reaches only 1.6",
        ),
        (Budget(speed_up=math.inf), "speed_up must be above 1, got inf"),
        (
            Budget(max_memory=279e-9),
            "fit the weights into 279 bytes, but it reaches only 280 bytes",
        ),
        (
            Budget(max_memory=400e-9),
            "below the 4e-07 GB that the weights take now, got 4e-07: nothing",
        ),
        (Budget(max_memory=0.0), "positive number of GB, got 0.0"),
        (Budget(max_memory=math.inf), "positive number of GB, got inf"),
    ],
)
def test_what_cannot_be_reached_is_refused(budget: Budget, message: str) -> None:
    with pytest.raises(SimdiffError) as refusal:
        budget.layers(MODEL)
    assert message in str(refusal.value)


def test_scores_without_sizes_say_what_to_run() -> None:
    model = {key: value for key, value in MODEL.items() if key != "layer_parameters"}
    assert Budget(ratio=0.5).layers(model) == 2
    with pytest.raises(SimdiffError, match="needs the sizes of the layers.*`simdiff score`"):
        Budget(speed_up=1.2).layers(model)


def test_sizes_are_those_of_the_model(llama: PreTrainedModel) -> None:
    """A layer has 7680 entries of matrices and 64 of norms; what is around them a norm of 32."""
    model = model_identity(llama, "tiny")
    assert model["layer_parameters"] == [7680 + 64] * 6
    assert model["num_parameters"] == 6 * 7744 + 2 * 97 * 32 + 32
    assert model["embedding_parameters"] == 97 * 32
    assert Budget(parameter_ratio=3 * 7744 / (6 * 7744 + 6240)).layers(model) == 3
    assert Budget(max_memory=(4 * (5 * 7744 + 6240) - 1) / 1e9).layers(model) == 2


def test_a_single_layer_stays() -> None:
    model = {**MODEL, "num_layers": 1, "layer_parameters": [100]}
    with pytest.raises(SimdiffError, match="removing 0 of 1 layers must .* reaches only 0$"):
        Budget(parameter_ratio=0.1).layers(model)


@pytest.mark.parametrize(
    ("dtype", "width"), [("float64", 8), ("float32", 4), ("float16", 2), ("bfloat16", 2)]
)
def test_bytes_of_a_dtype(dtype: str, width: int) -> None:
    model = {**MODEL, "dtype": dtype}
    assert Budget(max_memory=width * 190 / 1e9).layers(model) == 1
    assert Budget(max_memory=(width * 190 - 1) / 1e9).layers(model) == 2


def test_ratio() -> None:
    assert layers_for_ratio(30, 0.25) == 7
    assert layers_for_ratio(32, 0.25) == 8
    assert layers_for_ratio(10, 0.3) == 3
    for ratio in (0, 1, -0.1, 1.5, math.nan):
        with pytest.raises(SimdiffError, match="above 0 and below 1"):
            layers_for_ratio(30, ratio)
    with pytest.raises(SimdiffError, match=r"at least one of 30 layers \(0.0333"):
        layers_for_ratio(30, 0.01)
