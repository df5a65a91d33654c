"""Attention and MLP sub-layers: the residual steps of every decoder layer, found by structure."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models import find_decoder_layers

ATTENTION = "attention"
"""The sub-layer that mixes tokens: attention, or the linear attention, convolution or state space
model that stands in its place, or several of them side by side."""
MLP = "mlp"
"""The sub-layer that treats every token alone: dense, or a mixture of experts."""
KINDS = (ATTENTION, MLP)
ALL_KINDS = "sublayer"
UNITS = (*KINDS, ALL_KINDS)
"""What a plan of sub-layers chooses among: one kind, or both."""


class SublayerName(NamedTuple):
    """Which sub-layer: its decoder layer, counted from 0, and its kind, one of `KINDS`."""

    layer: int
    kind: str

    def __str__(self) -> str:
        """For people: `attention 12`."""
        return f"{self.kind} {self.layer}"


@dataclass(frozen=True)
class Part:
    """A module of a decoder layer that serves one sub-layer alone."""

    path: str
    """From the decoder layer."""
    adds: bool
    """Whether what it returns is added to the hidden state; else another part reads it."""
    num_outputs: int | None
    """Length of the tuple that it returns, of which the first entry counts; None for a tensor."""


@dataclass(frozen=True)
class Sublayer:
    """One residual step of a decoder layer."""

    name: SublayerName
    parts: tuple[Part, ...]
    """In the order in which they run: norms of its own, mixer or MLP, what follows it."""


@dataclass(frozen=True)
class LayerSteps:
    """The residual steps of one decoder layer, in order.

    Sequential: y = m + f(m) with m = x + g(x), as in most families. Parallel: y = x + g(x) + f(x),
    as in GPT-NeoX, Phi or Falcon. A layer may have a single step (Mamba, Nemotron-H).
    """

    sublayers: tuple[Sublayer, ...]
    parallel: bool
    entry: str | None
    """Path of the module that the state between two sequential steps enters first."""


@dataclass(frozen=True)
class SublayerMap:
    """All residual steps of a model, layer by layer."""

    layers: tuple[LayerSteps, ...]

    def __iter__(self) -> Iterator[Sublayer]:
        """Every sub-layer, in the order of `names`."""
        return (sublayer for steps in self.layers for sublayer in steps.sublayers)

    @property
    def names(self) -> tuple[SublayerName, ...]:
        """Of all sub-layers in order of depth: attention 0, mlp 0, attention 1, ..."""
        return tuple(sublayer.name for sublayer in self)

    def chosen(self, names: Collection[tuple[int, str]]) -> list[Sublayer]:
        """The sub-layers of these names, in order of depth.

        Raises:
            SimdiffError: no such sub-layer, one named twice, or none, or all of them.
        """
        known = dict(zip(self.names, self, strict=True))
        for name in names:
            if tuple(name) not in known:
                raise SimdiffError(
                    f"sub-layers must be of layers 0 to {len(self.layers) - 1} and of kinds that "
                    f"they have ({', '.join(KINDS)}), got {SublayerName(*name)}"
                )
        if len(set(names)) != len(names):
            raise SimdiffError(
                f"sub-layers must be named once each, got {', '.join(map(str, sorted(names)))}"
            )
        if not 0 < len(names) < len(known):
            raise SimdiffError(
                f"the sub-layers to remove must be 1 to {len(known) - 1} of {len(known)}, "
                f"got {len(names)}"
            )
        return [sublayer for name, sublayer in known.items() if name in names]


def check_unit(unit: str) -> None:
    """Refuse what is not in `UNITS`.

    Raises:
        SimdiffError: what would be right.
    """
    if unit not in UNITS:
        raise SimdiffError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")


def is_of(unit: str, name: SublayerName) -> bool:
    """Whether a plan of this unit may remove the sub-layer."""
    return unit in (ALL_KINDS, name.kind)


def find_sublayers(model: PreTrainedModel) -> SublayerMap:
    """The attention and MLP sub-layers of every decoder layer.

    No name of a module decides: the model reads six tokens, the data that flow between the modules
    of each decoder layer tell which belong together, and the layer is run without each group. A
    step is one if without it the hidden state stays as it was, to the last bit. Attention is what
    changes for the other tokens when the first one does.

    Args:
        model: a causal language model of transformers, in evaluation mode.

    Raises:
        SimdiffError: a layer that is built otherwise; its class is named.
    """
    from simdiff.sublayer_probe import layer_steps, recorded_inputs

    if model.training:
        raise SimdiffError("find_sublayers: model must be in evaluation mode, got training mode")
    layers: nn.ModuleList = find_decoder_layers(model).modules
    inputs = recorded_inputs(model, layers)
    return SublayerMap(
        tuple(layer_steps(index, layer, *inputs[index]) for index, layer in enumerate(layers))
    )
