"""Whether every weight of a loaded model came from its files, by what loading reported."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models.config import mtp_counts, text_part
from simdiff.models.structure import find_decoder_layers

_PACKED = re.compile(r"(scales?|scale_inv|zeros|qweight|packed|absmax|quant_state.*|_scale_\w+)$")
"""How the names of a quantiser's tensors end."""

_OLD_BUFFERS = re.compile(r"(\.(attn|attention)\.(bias|masked_bias)|inv_freq)$")
"""Tables that earlier versions of transformers saved with a layer, and no version reads."""


def check_loaded(model: PreTrainedModel, loading: Mapping[str, Any], what: str) -> None:
    """Refuse a model of which a part is not what its files hold.

    Args:
        model: as it was loaded.
        loading: what `from_pretrained` reported (`output_loading_info`).
        what: the model, for messages.

    Raises:
        SimdiffError: a weight is missing, of another shape, or has no place in the layers; says
            why that may be, and what to do.
    """
    missing = sorted(map(str, loading.get("missing_keys") or ()))
    unexpected = sorted(map(str, loading.get("unexpected_keys") or ()))
    mismatched = sorted(map(tuple, loading.get("mismatched_keys") or ()))
    fault = (
        _mismatched(mismatched)
        or _prefixed(missing, unexpected)
        or _too_deep(model, missing)
        or _missing(missing, unexpected, len(model.state_dict()))
        or _not_read(model, unexpected)
    )
    if fault:
        raise SimdiffError(f"{what}: {fault}")


def _mismatched(keys: Sequence[tuple[Any, ...]]) -> str | None:
    if not keys:
        return None
    name, stored, wanted = keys[0][:3]
    more = f" ({len(keys)} such tensors)" if len(keys) > 1 else ""
    return (
        f"{name} has shape {tuple(stored)} in the files and {tuple(wanted)} by config.json{more}: "
        "they belong to different models; take config.json from where the weights come from"
    )


def _prefixed(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """Whether all names in the files begin with what a wrapper puts before them."""
    if not missing or not unexpected:
        return None
    for name in unexpected:
        found = next((key for key in missing if name.endswith("." + key)), None)
        if found is not None:
            prefix = name[: -len(found)]
            return (
                f"names of tensors in its files begin with {prefix!r}, as a wrapper saves them: "
                "save the model within it (model._orig_mod of a compiled one, model.module of a "
                "parallel one, merge_and_unload() of an adapter), or take the prefix off the names"
            )
    return None


def _too_deep(model: PreTrainedModel, missing: Sequence[str]) -> str | None:
    """Whether whole layers at the end are missing."""
    layers = _Layers.of(model)
    if layers is None or not missing:
        return None
    absent = {layer for layer in map(layers.index, missing) if layer is not None}
    inside = [name for name in missing if layers.index(name) is not None]
    first = min(absent, default=0)
    whole = first > 0 and absent == set(range(first, layers.depth))
    stored = [name for name in model.state_dict() if (layers.index(name) or 0) >= first]
    if not whole or len(inside) != len(missing) or len(inside) < len(stored):
        return None
    return (
        f"config.json says {layers.depth} decoder layers, the files hold {first}: download the "
        "rest of the weights, or take the config.json that belongs to them"
    )


def _missing(missing: Sequence[str], unexpected: Sequence[str], total: int) -> str | None:
    if not missing:
        return None
    count = f"{len(missing)} of {total} tensors are" if len(missing) > 1 else f"{missing[0]} is"
    names = f" ({_some(missing)})" if len(missing) > 1 else ""
    if any(map(_PACKED.search, unexpected)):
        return (
            f"{count} not in the files{names}, which hold tensors of a quantiser ({unexpected[0]}) "
            "that config.json does not name: give the unquantised model"
        )
    head = len(missing) == 1 and re.search(r"(lm_head|embed_out|output)\.weight$", missing[0])
    if head:
        return (
            f"{missing[0]}, the language-model head, is not in the files, and config.json does not "
            "tie it to the embedding: copy it from the original model, or set tie_word_embeddings "
            "where the original does"
        )
    return (
        f"{count} not in the files{names}, so that they would be random numbers: download "
        "the rest of the weights, or take the config.json that belongs to them"
    )


def _not_read(model: PreTrainedModel, unexpected: Collection[str]) -> str | None:
    """Whether the layers' tensors are not all read. Others, such as a second head, do not count."""
    layers = _Layers.of(model)
    if layers is None or getattr(model, "hf_quantizer", None) is not None:
        return None
    text = text_part(model.config)
    heads = max(mtp_counts(text).values(), default=0)
    places = {name: layers.index(name) for name in unexpected if not _OLD_BUFFERS.search(name)}
    unread = [
        name
        for name, layer in places.items()
        if layer is not None and not layers.depth <= layer < layers.depth + heads
    ]
    if not unread:
        return None
    beyond = [layer for layer in places.values() if layer is not None and layer >= layers.depth]
    if beyond and all((places[name] or 0) >= layers.depth for name in unread):
        return (
            f"config.json says {layers.depth} decoder layers, the files hold {max(beyond) + 1}: "
            "take the config.json that belongs to them"
        )
    if any(map(_PACKED.search, unread)):
        return (
            f"the layers in the files have tensors of a quantiser ({_some(unread)}), and "
            "config.json names none that reads them: give the unquantised model, and prune this "
            "one's files with that plan"
        )
    return (
        f"{len(unread)} tensors of the layers in the files ({_some(unread)}) have no place in "
        f"{type(model).__name__}: config.json is of another model, or an adapter was saved with "
        "it; merge it, or take the config.json that belongs to the weights"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")


class _Layers:
    """The decoder layers' place among the names of parameters."""

    def __init__(self, path: str, depth: int) -> None:
        self.depth = depth
        self._inside = re.compile(rf"(^|\.){re.escape(path.split('.', 1)[-1])}\.(\d+)\.")

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Layers | None:
        """None if the model has no decoder layers that can be told apart."""
        try:
            found = find_decoder_layers(model)
        except SimdiffError:
            return None
        return cls(found.path, len(found))

    def index(self, name: str) -> int | None:
        """The layer that a tensor is of; None if it is of none."""
        match = self._inside.search(name)
        return int(match[2]) if match else None
