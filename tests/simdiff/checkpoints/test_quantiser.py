"""Entries of quantisation configs match after the cut what they matched of the kept layers."""

from __future__ import annotations

from typing import Any

import pytest

from simdiff.checkpoints.quantiser import Modules, carry_over
from simdiff.checkpoints.tensor_names import LayerNumbers, new_numbers
from simdiff.errors import SimdiffError

PARTS = ("self_attn.q_proj", "mlp.up_proj", "mlp.gate")
DECODER = "model.layers"
KEPT = (0, 2, 3, 5, 11)
LAYERS = LayerNumbers(DECODER, new_numbers(KEPT, 12, [12]), DECODER, ("tower.layers",))
TENSORS = [
    "model.embed_tokens.weight",
    "lm_head.weight",
    *(f"tower.layers.{layer}.mlp.up_proj.weight" for layer in range(12)),
    *(f"model.layers.{layer}.{part}.qweight" for layer in range(13) for part in PARTS),
]
MODULES = Modules.of(TENSORS, LAYERS)


def carried(entry: str, **more: str) -> Any:
    return carry_over({**more, "ignore": [entry]}, MODULES, "config.json")["ignore"]


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ("lm_head", ["lm_head"]),
        ("mlp.gate", ["mlp.gate"]),
        ("model.layers.5.mlp.gate", ["model.layers.3.mlp.gate"]),
        ("model.layers.1", []),
        ("model.layers.11", ["model.layers.4"]),
        ("model.layers.12.mlp", ["model.layers.5.mlp"]),  # a head behind the last layer
        ("tower.layers.4", ["tower.layers.4"]),
        ("layers.4", ["tower.layers.4.mlp.up_proj"]),  # the new layer 4 is another
        (
            "layers.3",
            [*(f"model.layers.2.{part}" for part in sorted(PARTS)), "tower.layers.3.mlp.up_proj"],
        ),
        (r"re:.*\.gate$", [r"re:.*\.gate$"]),
        (r"re:model\.layers\.(1|2|3)\.mlp.*", [r"re:model\.layers\.(1|2)\.mlp.*"]),
        (r"re:^(?:model\.)?layers\.5\..*gate", [r"re:^(?:model\.)?layers\.3\..*gate"]),
        ("model.layers.*.mlp", ["model.layers.*.mlp"]),
        ("*up_proj", ["*up_proj"]),
        ("nothing.here", ["nothing.here"]),
        ("other.layers.5.mlp", ["other.layers.3.mlp"]),  # a dialect of names that is not stored
        ("4", ["4"]),
    ],
)
def test_entries_match_what_they_matched(entry: str, wanted: list[str]) -> None:
    assert carried(entry) == wanted


@pytest.mark.parametrize(
    ("entry", "layers"),
    [
        (r"re:model\.layers\.\d\.mlp\.gate", (0, 1, 2, 3)),  # old 0 to 9; 11 is the new 4
        (r"re:.*model\.layers\.[0-3]\.mlp\.gate", (0, 1, 2)),
        (r"re:model\.layers\.(?!11)\d+\.mlp\.gate", (0, 1, 2, 3, 5)),
    ],
)
def test_expressions_that_are_written_out(entry: str, layers: tuple[int, ...]) -> None:
    assert carried(entry) == [f"model.layers.{layer}.mlp.gate" for layer in layers]


def test_wildcards_are_no_regular_expressions() -> None:
    """ModelOpt's 1* is layers 1, 10, 11 and the head 12; of these 11 and 12 stay, as 4 and 5."""
    found = carried("model.layers.1*", quant_method="modelopt")
    assert found == [f"model.layers.{n}.{part}" for n in (4, 5) for part in sorted(PARTS)]
    with pytest.raises(SimdiffError, match=r"ignore: 'model.layers.1\*' .* by an expression"):
        carried("model.layers.1*")


def test_keys_and_marks_of_gptq() -> None:
    dynamic = {
        r"-:model\.layers\.4\..*": {},
        r"+:model\.layers\.[23]\.mlp\.up": {"bits": 8},
        r"+:model.*layers\.5\.": {"bits": 2},
    }
    found = carry_over({"bits": 4, "dynamic": dynamic}, MODULES, "config.json")
    assert found == {
        "bits": 4,
        "dynamic": {
            r"+:(?:model\.layers\.1\.mlp\.up_proj|model\.layers\.2\.mlp\.up_proj)$": {"bits": 8},
            r"+:model.*layers\.3\.": {"bits": 2},
        },
    }
