"""Decoder layers are found or refused."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models.structure import find_decoder_layers


def test_a_model_without_decoder_layers_is_refused(llama: PreTrainedModel) -> None:
    llama.config.num_hidden_layers = 5
    with pytest.raises(SimdiffError, match=r"one list of 5 decoder layers.*model.layers \(6\)"):
        find_decoder_layers(llama)
