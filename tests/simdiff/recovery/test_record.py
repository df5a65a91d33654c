"""What a recovery changed: parameters that are finite, named and shaped as before."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.recovery.record import changed_parameters, differing, digest, worse_notes
from simdiff.surgery.copies import own_parameters, replace_parameter, sharing_copy

REMOVED = (4, 1)


def test_a_method_cannot_break_the_model(llama: PreTrainedModel) -> None:
    pruned = sharing_copy(llama, REMOVED)
    plain = sharing_copy(llama, REMOVED)
    assert changed_parameters(pruned, plain) == {}
    projection = pruned.model.layers[1].mlp.down_proj
    replace_parameter(projection, "weight", projection.weight * 2)
    name = "model.layers.1.mlp.down_proj.weight"
    assert changed_parameters(pruned, plain) == {name: digest(projection.weight)}
    assert not torch.equal(projection.weight, llama.model.layers[2].mlp.down_proj.weight)
    replace_parameter(projection, "weight", projection.weight * torch.nan)
    with pytest.raises(SimdiffError, match=f"NaN or Inf in 1, first {name}"):
        changed_parameters(pruned, plain)
    projection.weight = torch.nn.Parameter(torch.ones(3, 3))
    with pytest.raises(SimdiffError, match="names and shapes of all parameters"):
        changed_parameters(pruned, plain)
    own = sharing_copy(llama, REMOVED)
    own_parameters(own)
    shared = {id(parameter) for parameter in llama.parameters()}
    assert not any(id(parameter) in shared for parameter in own.parameters())
    assert list(differing(own, plain)) == []


@pytest.mark.parametrize(
    ("pruned", "recovered", "told"),
    [(97.67, 97.671, ""), (97.67, 97.66, ""), (97.67, 97.69, "97.69 against 97.67 of the plain")],
)
def test_worse_is_told_where_the_numbers_show_it(
    pruned: float, recovered: float, told: str
) -> None:
    quality = {"pruned": {"perplexity": pruned}, "recovered": {"perplexity": recovered}}
    notes = worse_notes(quality)
    assert (told in notes[0]) if told else notes == ()
