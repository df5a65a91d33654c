"""Plans as users give them: files, layers named by hand, plans made for a sibling of the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.io.progress import tell
from simdiff.models.config import layer_count
from simdiff.models.files import same_weights
from simdiff.models.identity import model_identity, same_layers
from simdiff.models.loading import load_config, meta_model, source_directory
from simdiff.models.weights import stored_weights
from simdiff.planning.plan import PruningPlan

Plan: TypeAlias = PruningPlan | str | Path | Collection[int]
"""A plan, its file (see `PruningPlan.load`), or the layers to remove."""


def read_plan(plan: Plan) -> PruningPlan:
    """A plan as an object.

    Raises:
        SimdiffError: see `PruningPlan.load`.
    """
    if isinstance(plan, PruningPlan):
        return plan
    if isinstance(plan, (str, Path)):
        return PruningPlan.load(plan)
    if not isinstance(plan, Collection):
        raise SimdiffError(
            "a plan must be a PruningPlan, a file, or layers such as [2, 3], got "
            f"{type(plan).__name__}"
        )
    return PruningPlan(tuple(plan))


def check_depth(plan: PruningPlan, name: str) -> None:
    """Refuse layers named by hand that a model by name does not have, before it is loaded.

    Raises:
        SimdiffError: see `PruningPlan.of_depth`.
    """
    if plan.by_hand:
        plan.of_depth(layer_count(load_config(source_directory(name))), name)


def fitted(
    plan: PruningPlan,
    model: PreTrainedModel,
    name: str,
    weights: Mapping[str, str] | None = None,
) -> PruningPlan:
    """A plan as the plan of this model, where it can be: its record then names this model.

    Layers named by hand are of any model that has them. A plan for one model is a plan for another
    one whose decoder layers have the same shapes, such as a fine-tuned version, and its notes, and
    a line on standard error, say so. Any other plan is returned as it is; `check_same_model` tells
    whether it is for this model.

    Args:
        plan: of any model.
        model: the dense model, without weights too.
        name: of the model, for the record.
        weights: of a model without them, see `simdiff.models.weights.stored_weights`.

    Raises:
        SimdiffError: layers named by hand that this model does not have.
    """
    identity = model_identity(model, name)
    if weights is not None:
        identity["weights"] = dict(weights)
    known = plan.model.get("fingerprint")
    if known == identity["fingerprint"]:
        same = same_weights(plan.model, identity)
        if same is False:
            note = (
                f"the plan was made for {plan.model.get('name') or 'another model'}, whose weights "
                f"differ from those of {name}: one is a fine-tuned or quantised version"
            )
            tell(f"Note: {note}")
            return replace(plan, model=identity, notes=(*plan.notes, note))
        if same is None and identity["weights"]:  # what it lies beside then tells its weights
            return replace(plan, model=plan.model | {"weights": identity["weights"]})
        return plan
    if known is None and plan.by_hand:
        plan = plan.of_depth(int(identity["num_layers"]), name)
        return replace(plan, model=identity)
    if not same_layers(plan.model, identity):
        return plan
    note = (
        f"the plan was made for {plan.model.get('name') or 'another model'}, whose decoder layers "
        f"have the same shapes as those of {name}; what it lies beside (such as the vocabulary) "
        "differs"
    )
    tell(f"Note: {note}")
    return replace(plan, model=identity, notes=(*plan.notes, note))


def plan_for(name: str, plan: Plan) -> PruningPlan:
    """The plan of a model by name, from its config alone; see `fitted`.

    Raises:
        SimdiffError: no such plan or model, or layers that the model does not have.
    """
    found = read_plan(plan)
    directory = source_directory(name)
    config = load_config(directory)
    if found.by_hand:
        found = found.of_depth(layer_count(config), name)
    return fitted(found, meta_model(config), name, stored_weights(directory))
