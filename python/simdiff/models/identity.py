"""The identity of a model as result files store it, and the check that a model still has it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
)

from simdiff.errors import SimdiffError
from simdiff.io.json_files import read_json
from simdiff.io.kinds import PLAN_FILE
from simdiff.models.structure import find_decoder_layers, text_config
from simdiff.models.weights import is_packed, weights_of


def model_identity(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """The identity of a model, as scores, plans and results store it.

    `fingerprint` is a SHA-256 over the names and shapes of all parameters. Copies, other dtypes and
    fine-tuned versions of a model have the same fingerprint; other models have another one. So do
    quantised versions: names and shapes are then those of the stock model of the same config, since
    packed parameters have other ones, and some kernels pack them anew at the first forward.
    `weights` tells a fine-tuned version from its base, see `simdiff.models.weights`.
    """
    return {**shapes_of(model, name), "weights": weights_of(model)}


def told_by(model: PreTrainedModel) -> dict[str, Any]:
    """Fingerprint and weights of a model; empty where its decoder layers are not found."""
    with contextlib.suppress(SimdiffError):
        identity = model_identity(model, "")
        return {key: identity[key] for key in ("fingerprint", "weights")}
    return {}


def shapes_of(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """The identity of a model without its weights, which it need not have."""
    dtype = model.dtype
    if is_packed(model):
        with torch.device("meta"):
            model = type(model)(copy.deepcopy(model.config))
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode())
    return {
        "name": name,
        "architecture": type(model).__name__,
        "num_layers": len(find_decoder_layers(model)),
        "hidden_size": text_config(model).hidden_size,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "layer_parameters": [
            sum(p.numel() for p in layer.parameters())
            for layer in find_decoder_layers(model).modules
        ],
        "embedding_parameters": _lookup_parameters(model),
        "dtype": str(dtype).removeprefix("torch."),
        "fingerprint": digest.hexdigest(),
        "layers_fingerprint": _layers_fingerprint(model),
    }


def stored_cut(name: str | Path) -> dict[str, Any]:
    """What the plan.json in a pruned checkpoint's directory says of the cut, if there is one.

    Returns:
        `removed`, the layers in rising order, `cut_from`, the dense model's fingerprint, and
        `cut_from_weights`, where they are known; empty for other models.
    """
    path = Path(name) / PLAN_FILE
    if not path.is_file():
        return {}
    with contextlib.suppress(SimdiffError, KeyError, TypeError, ValueError, AttributeError):
        content = read_json(path, "simdiff.plan")
        removed = sorted(map(int, content["removed"]))
        model = content.get("model", {})
        weights = {"cut_from_weights": model["weights"]} if model.get("weights") else {}
        return {"removed": removed, "cut_from": model.get("fingerprint"), **weights}
    return {}


def _lookup_parameters(model: PreTrainedModel) -> int:
    """Parameters of the input embedding if it is not tied to the head; else 0.

    Decoding reads only one row of such an embedding per token.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        return 0
    return int(embedding.weight.numel())


def check_same_model(model: PreTrainedModel, made_for: dict[str, Any], what: str) -> None:
    """Refuse scores or plans that were made for another model.

    Raises:
        SimdiffError: the fingerprints differ.
    """
    identity = shapes_of(model, "")
    if identity["fingerprint"] != made_for.get("fingerprint"):
        differing = ", ".join(
            f"{key} {made_for.get(key)} against {identity[key]}"
            for key in ("architecture", "num_layers", "hidden_size", "num_parameters")
            if made_for.get(key) != identity[key]
        )
        raise SimdiffError(
            f"the {what} was made for another model, {made_for.get('name')!r}: "
            f"{differing or 'parameters have other names or shapes'}"
        )


def _layers_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the names and shapes of the parameters of every decoder layer."""
    shapes = [
        {name: list(parameter.shape) for name, parameter in layer.named_parameters()}
        for layer in find_decoder_layers(model).modules
    ]
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


def same_layers(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the decoder layers of two identities have the same shapes, whatever lies around them.

    Identities of earlier versions tell only how many parameters each layer has.
    """
    keys = ["architecture", "num_layers", "hidden_size", "layer_parameters"]
    if "layers_fingerprint" in one and "layers_fingerprint" in other:
        keys.append("layers_fingerprint")
    return all(one.get(key) == other.get(key) is not None for key in keys)
