"""Find the decoder layers in a checkpoint's tensor names, number them anew, and check that each has
the tensors the stock model expects."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedConfig

from simdiff.checkpoints.save_order import Group
from simdiff.checkpoints.tensor_names import (
    LayerNumbers,
    counted_prefixes,
    find_prefix,
    layer_of,
    new_numbers,
)
from simdiff.checkpoints.weight_index import StoredWeights
from simdiff.errors import SimdiffError
from simdiff.models.config import layer_count, mtp_counts, text_part
from simdiff.planning.plan import PruningPlan

Shapes = Mapping[Group, list[tuple[int, ...]]]


def number_layers(
    weights: StoredWeights,
    plan: PruningPlan,
    config: PreTrainedConfig,
    dense: Shapes,
    pruned: Shapes,
) -> LayerNumbers:
    """Find the decoder layers in the names of the stored tensors, and number them anew.

    Args:
        weights: the stored weights of the checkpoint.
        plan: the plan.
        config: config of the dense model.
        dense, pruned: names and shapes that stock transformers would save before and after the
            cut. Their difference shows which numbers in the names count decoder layers.

    Raises:
        SimdiffError: config, plan and weights disagree on the layers.
    """
    num_layers = layer_count(config)
    if plan.num_layers != num_layers:
        raise SimdiffError(
            f"{weights.directory / 'config.json'}: must say {plan.num_layers} layers like the "
            f"plan, got {num_layers}"
        )
    gone = {name for group in dense for name in group} - {name for g in pruned for name in g}
    expected = next(iter(counted_prefixes(sorted(gone))))
    prefix = find_prefix(
        weights.tensors,
        num_layers,
        max(mtp_counts(text_part(config)).values(), default=0),
        expected,
        str(weights.directory),
    )
    found = counted_prefixes(weights.tensors)
    heads = sorted(number for number in found[prefix] if number >= num_layers)
    others = tuple(sorted(other for other in found if other != prefix))
    return LayerNumbers(prefix, new_numbers(plan.kept, num_layers, heads), expected, others)


def has_heads(weights: StoredWeights, layers: LayerNumbers, num_layers: int) -> bool:
    """Whether multi-token-prediction heads are stored, after the last layer or under "mtp"."""
    return any(layer >= num_layers for layer in layers.new) or any(
        "mtp" in name.split(".")[:2] for name in weights.tensors
    )


def check_layers_stored(
    weights: StoredWeights, layers: LayerNumbers, num_layers: int, dense: Shapes, quantised: bool
) -> None:
    """Check that every tensor of the stock model's layers is stored, in the same shape.

    In a quantised checkpoint, whose tensors have other names and shapes, every module must have
    some tensor.

    Raises:
        SimdiffError: names the tensor and the layer where one is missing or has another shape.
    """
    stored = weights.tensors
    modules = {name.rpartition(".")[0] for name in stored}
    modules |= {module.rpartition(".")[0] for module in modules}
    for group, shapes in dense.items():
        for name, shape in zip(group, shapes, strict=True):
            layer = layer_of(name, layers.stock)
            here = name if layer is None else layers.prefix + name[len(layers.stock) :]
            if quantised:
                if (
                    layer is not None
                    and here not in stored
                    and here.rpartition(".")[0] not in modules
                ):
                    raise _missing(weights, here, layer, num_layers)
            elif here in stored:
                if stored[here].shape != shape:
                    raise SimdiffError(
                        f"{stored[here].path}: tensor {here!r} must have shape {shape} by "
                        f"config.json, got {stored[here].shape}: config and weights belong to "
                        "different models"
                    )
            elif layer is not None:
                raise _missing(weights, here, layer, num_layers)


def _missing(weights: StoredWeights, name: str, layer: int, num_layers: int) -> SimdiffError:
    return SimdiffError(
        f"{weights.directory}: layer {layer} of 0 to {num_layers - 1} must have the tensor "
        f"{name!r}, and has not: the checkpoint is incomplete, or config.json is of another model"
    )
