"""Modules that replace a removed sub-layer, so that its layer's forward still runs."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from simdiff.sublayers.structure import Part, Sublayer

_HIDDEN = "hidden_states"


class StandIn(nn.Module):
    """Replaces one module of a removed sub-layer; has no parameters.

    It returns its input, or zeros if the original's output is added to the hidden state: x + 0 is x
    to the last bit, whatever factor the layer applies to the zeros.

    Args:
        original: the replaced module; its plain attributes (`layer_idx`, `is_sliding`, ...) are
            copied, since a model may read them.
        part: the role of the original in its sub-layer.
        slot: the layer's place in the KV cache if the stand-in must count tokens there. Caches ask
            one layer, in general layer 0, for the length of all, and masks and positions follow
            from it. One number per token is stored in place of the keys and values. None counts
            nothing.
    """

    def __init__(self, original: nn.Module, part: Part, slot: int | None) -> None:
        """Copy the attributes of the original that are neither modules nor tensors."""
        super().__init__()
        for key, value in vars(original).items():
            if not key.startswith("_") and not isinstance(value, Tensor) and not callable(value):
                vars(self)[key] = value
        for key, parameter in original.named_parameters(recurse=False):
            vars(self)[key] = parameter.detach().new_empty(0)  # Nemotron-H reads its norm's dtype
        self._part = part
        self._slot = slot

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros or the input, in the form of the original's output."""
        states = first_states(args, kwargs)
        assert states is not None  # modules without one are never replaced
        if self._slot is not None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Cache):
                    _count_tokens(value, self._slot, states)
                    break
        output = torch.zeros_like(states) if self._part.adds else states
        length = self._part.num_outputs
        return output if length is None else (output, *[None] * (length - 1))


def first_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among the arguments of a module: the first, or `hidden_states`."""
    candidates = [*args[:1], kwargs.get(_HIDDEN), *kwargs.values()]
    return next((c for c in candidates if isinstance(c, Tensor) and c.is_floating_point()), None)


def _slot_of(module: nn.Module) -> int | None:
    """The place in the KV cache that a module uses; GPT-Neo calls it `layer_id`."""
    names = ("layer_idx", "layer_id")
    found = (getattr(inner, name, None) for inner in module.modules() for name in names)
    return next((index for index in found if isinstance(index, int)), None)


def _count_tokens(cache: Cache, layer: int, states: Tensor) -> None:
    slot = cache.layers[layer] if layer < len(cache.layers) else None
    if isinstance(slot, LinearAttentionCacheLayerMixin):
        for state in slot.has_previous_state:  # caches ask the last layer with such states
            slot.has_previous_state[state] = True
    if slot is None or isinstance(slot, CacheLayerMixin):
        nothing = states.new_zeros((states.shape[0], 1, states.shape[1], 1))
        cache.update(nothing, nothing, layer)


class StandIns:
    """The stand-ins of some sub-layers, which can be put in and taken out any number of times.

    Args:
        layer_of: the decoder layers, by index.
        sublayers: the sub-layers to replace.
    """

    def __init__(
        self, layer_of: nn.ModuleList | dict[int, nn.Module], sublayers: Collection[Sublayer]
    ) -> None:
        """Make the stand-ins; nothing is replaced yet."""
        self._places: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        for sublayer in sublayers:
            layer, counted = layer_of[sublayer.name.layer], False
            for part in sublayer.parts:
                parent_path, _, child = part.path.rpartition(".")
                original = layer.get_submodule(part.path)
                slot = None if counted else _slot_of(original)
                counted = counted or slot is not None
                stand_in = StandIn(original, part, slot)
                self._places.append((layer.get_submodule(parent_path), child, original, stand_in))

    def put_in(self) -> None:
        """Replace the original modules by the stand-ins."""
        for parent, child, _, stand_in in self._places:
            parent._modules[child] = stand_in

    def take_out(self) -> None:
        """Put the original modules back."""
        for parent, child, original, _ in self._places:
            parent._modules[child] = original


@contextlib.contextmanager
def replaced_by_stand_ins(
    layer_of: nn.ModuleList | dict[int, nn.Module], sublayers: Collection[Sublayer]
) -> Iterator[None]:
    """Replace sub-layers by stand-ins inside a with block."""
    stand_ins = StandIns(layer_of, sublayers)
    stand_ins.put_in()
    try:
        yield
    finally:
        stand_ins.take_out()
