"""The stock class that a checkpoint is of, and why other classes cannot be used."""

from __future__ import annotations

import re
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models.config import text_part

# Vision-language and audio-language models; the second name is that of earlier transformers.
_MULTIMODAL: Any = getattr(
    transformers, "AutoModelForMultimodalLM", transformers.AutoModelForImageTextToText
)

_USED = "simdiff takes causal language models and vision-language models"

_OTHERS = (
    (
        r"MaskedLM|PreTraining",
        f"predicts masked tokens and reads text in both directions: {_USED}",
    ),
    (
        r"Classification|Reward|Score|Value|QuestionAnswering|MultipleChoice|Regression",
        "has the head of a classifier or reward model, none that predicts tokens: give the "
        "language model that it was trained from",
    ),
    (
        r"Model$",
        "has no language-model head: give the checkpoint with the head, of which it is the body",
    ),
)
"""By the name of a class: what it is, and what to do."""


def auto_class(config: PreTrainedConfig, what: str = "the config") -> Any:
    """The auto class of transformers that makes the class which a checkpoint's config names.

    Args:
        config: of the checkpoint; `architectures` names its class.
        what: the model, for messages.

    Raises:
        SimdiffError: the class is no causal or vision-language model; says what it is.
    """
    named = next(iter(config.architectures or ()), None)
    refuse_other_kinds(named or type(config).__name__, config, what)
    causal = _class_name(AutoModelForCausalLM, config)
    multimodal = _class_name(_MULTIMODAL, config)
    if named is not None and named == causal:
        return AutoModelForCausalLM
    if multimodal is not None and (named == multimodal or causal is None):
        return _MULTIMODAL
    # A causal class of another name is a fork of the stock one. Whether it is the same shows when
    # its weights are loaded: every one must have its place.
    if causal is not None and (named is None or re.search(r"CausalLM|LMHead", named)):
        return AutoModelForCausalLM
    if named is None:
        raise SimdiffError(
            f"{what}: must be a language model of stock transformers, got {config.model_type!r}, "
            f"which has none: {_USED}"
        )
    raise SimdiffError(f"{what}: config.json names {named}, which is something else: {_USED}")


def refuse_other_kinds(named: str, config: PreTrainedConfig, what: str) -> None:
    """Refuse encoder-decoders, and classes whose names say that they predict no next token.

    Args:
        named: the class of the model.
        config: its config.
        what: the model, for messages.

    Raises:
        SimdiffError: says what the class is, and what to do.
    """
    if config.is_encoder_decoder or getattr(text_part(config), "is_encoder_decoder", False):
        raise SimdiffError(
            f"{what}: {named} is an encoder-decoder, whose decoder reads what an encoder made of "
            f"another input; {_USED}, which read text alone"
        )
    # The causal classes of encoder-decoders set is_decoder themselves; those of BERT do not.
    both_ways = getattr(config, "is_decoder", None) is False
    both_ways = both_ways and not getattr(type(config), "is_encoder_decoder", False)
    if both_ways and type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        raise SimdiffError(
            f"{what}: {named} reads text in both directions (is_decoder is false in its config): "
            f"{_USED}"
        )
    for pattern, found in _OTHERS:
        if re.search(pattern, named) and not re.search(r"CausalLM|LMHead|Conditional", named):
            raise SimdiffError(f"{what}: {named} {found}")


def check_class(model: PreTrainedModel, what: str) -> None:
    """Refuse a model in memory that predicts no next token.

    Raises:
        SimdiffError: says what it is, and what to do.
    """
    name = type(model).__name__
    refuse_other_kinds(name, model.config, what)
    if model.get_output_embeddings() is None and model.can_generate() is False:
        raise SimdiffError(f"{what}: {name} has no language-model head: {_USED}")


def _class_name(auto: Any, config: PreTrainedConfig) -> str | None:
    """The name of the class that an auto class makes for a config; None if it makes none."""
    found = auto._model_mapping.get(type(config), None)
    if isinstance(found, tuple):
        found = next((one for one in found if one.__name__ in (config.architectures or ())), None)
    return None if found is None else str(found.__name__)
