"""Read a written checkpoint back, before anybody sees it: does it hold what its own config says?

Nothing is loaded. The config that was written builds its stock class on the meta device, and names,
shapes and dtypes in the headers of the weight files are compared with what that class would save.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from simdiff.checkpoints.quantiser import QUANTISER_ENTRIES
from simdiff.checkpoints.save_order import record_conversions, saved_tensors
from simdiff.checkpoints.weight_index import read_weights
from simdiff.errors import SimdiffError
from simdiff.io.json_files import load_json
from simdiff.io.safetensors_header import StoredTensor
from simdiff.models.config import MTP, layer_count
from simdiff.surgery.config_entries import Depth
from simdiff.surgery.config_patch import read_config, stale_counts, text_entries
from simdiff.surgery.config_search import PER_LAYER
from simdiff.surgery.structure import build

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Fit:
    """How the tensors of a checkpoint fit the stock model of its config."""

    missing: frozenset[str] = frozenset()
    """Parameters that are in no file, so that loading fills them with random numbers."""
    unexpected: frozenset[str] = frozenset()
    """Tensors that the model does not have."""
    misshapen: frozenset[str] = frozenset()
    packed: frozenset[str] = frozenset()
    """Tensors that are not plain floating point where the model's are."""

    def renamed(self, rename: Callable[[str], str | None]) -> Fit:
        """The same of the checkpoint after the cut; what was of removed layers is gone."""
        kinds = (self.missing, self.unexpected, self.misshapen, self.packed)
        return Fit(*(frozenset(new for n in names if (new := rename(n))) for names in kinds))


def fit(tensors: Mapping[str, StoredTensor], model: PreTrainedModel) -> Fit:
    """Compare stored tensors with those that the stock model would save.

    Args:
        tensors: tensors by their stored names.
        model: the stock model on the meta device.
    """
    record_conversions(model, tensors)
    wanted = saved_tensors(model)
    base = model.base_model_prefix
    stored_as: dict[str, str] = {}
    for name in wanted:
        # Names may lack the prefix of the base model (GPT-2's h.0), or have it where it is not due.
        for other in (name, name.removeprefix(f"{base}."), f"{base}.{name}"):
            if other in tensors:
                stored_as[name] = other
                break
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    twins = tied | {source: target for target, source in tied.items()}
    absent = {
        name
        for name in wanted.keys() - stored_as.keys()
        if twins.get(name) not in tensors
        and not _matches(name, model._keys_to_ignore_on_load_missing)
    }
    extra = {
        name
        for name in tensors.keys() - set(stored_as.values())
        if name not in twins and not _matches(name, model._keys_to_ignore_on_load_unexpected)
    }
    pairs = [(wanted[name], tensors[other]) for name, other in stored_as.items()]
    return Fit(
        frozenset(absent),
        frozenset(extra),
        frozenset(s.name for stock, s in pairs if tuple(stock.shape) != s.shape),
        frozenset(
            s.name for stock, s in pairs if stock.is_floating_point() and s.dtype not in _FLOATS
        ),
    )


def _matches(name: str, patterns: Any) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def read_back(
    directory: Path,
    model_class: type[PreTrainedModel],
    config_class: type[PreTrainedConfig],
    depth: Depth,
    known: Fit | None = None,
) -> None:
    """Refuse a checkpoint that its own config does not describe.

    Args:
        directory: what was written; it has not appeared yet.
        model_class, config_class: the stock classes that load it.
        depth: the cut that led to it.
        known: what did not fit in the checkpoint that was cut, and so may not fit in this one; None
            for weights that come from memory, which must fit.

    Raises:
        SimdiffError: tensors are missing, unexpected, of another shape or packed without a
            description; or the config still counts or lists layers that are gone.
    """
    content = load_json(directory / "config.json")
    tensors = read_weights(directory).tensors
    config = read_config(config_class, content)
    quantised = any(
        name in part
        for name in QUANTISER_ENTRIES
        for part in (content, text_entries(content, config))
    )
    found = fit(tensors, build(model_class, config))
    allowed = known or Fit()
    faults = (
        []
        if quantised
        else [
            *_listed("missing", found.missing - allowed.missing),
            *_listed("in no model of that config", found.unexpected - allowed.unexpected),
            *_listed("of another shape", found.misshapen - allowed.misshapen),
            *_listed("packed, without a quantization_config", found.packed - allowed.packed),
        ]
    )
    if known is None and quantised and not found.packed and not found.unexpected:
        faults.append("a quantization_config is left, but all weights are plain")
    if known is None and not quantised:
        faults += _other_dtype(content, tensors)
    faults += stale_entries(content, config, depth)
    if faults:
        raise SimdiffError(
            f"the checkpoint that was written does not hold what its own config.json describes "
            f"({'; '.join(faults)}), so it would load as another model: nothing was kept. If the "
            "model lies in a directory, cut its files: prune without dtype=..."
        )


def _listed(what: str, names: frozenset[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return [f"{what}: {', '.join(sorted(names)[:2])}{more}"]


def _other_dtype(content: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> list[str]:
    said = content.get("dtype", content.get("torch_dtype"))
    stored = {_FLOATS[t.dtype] for t in tensors.values() if t.dtype in _FLOATS}
    if said is None or said in stored or not stored:
        return []
    return [f"dtype {said} in the config, but the weights are {', '.join(sorted(stored))}"]


def stale_entries(content: dict[str, Any], config: PreTrainedConfig, depth: Depth) -> list[str]:
    """Counts and lists in a config.json that are still those of the dense model."""
    stale = [f"{name} is {depth.num_layers}" for name, _ in stale_counts(content, config, depth)]
    if layer_count(config) != len(depth.kept):
        stale.append(f"{layer_count(config)} layers instead of {len(depth.kept)}")
    parts = {id(part): part for part in (content, text_entries(content, config))}
    return stale + [
        f"{name} still has {len(value)} entries"
        for part in parts.values()
        for name, value in part.items()
        if isinstance(value, list)
        and len(value) == depth.num_layers
        and PER_LAYER.search(name)
        and not MTP.search(name)
    ]
