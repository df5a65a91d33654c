"""Attention and MLP sub-layers: the residual steps of every decoder layer, and how to find them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from simdiff.errors import SimdiffError
from simdiff.planning.names import SUBLAYER_UNITS

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ATTENTION = "attention"
"""Kind of the sub-layer that mixes tokens: attention, linear attention, a convolution or a state
space model, or several of them side by side."""
MLP = "mlp"
"""Kind of the sub-layer that treats every token alone: dense, or a mixture of experts."""
KINDS = (ATTENTION, MLP)
ALL_KINDS = "sublayer"
UNITS = SUBLAYER_UNITS
"""Names of what a plan of sub-layers chooses among: one kind, or both."""


class SublayerName(NamedTuple):
    """The name of a sub-layer: its decoder layer, counted from 0, and its kind, one of `KINDS`."""

    layer: int
    kind: str

    def __str__(self) -> str:
        """The name for people, such as `attention 12`."""
        return f"{self.kind} {self.layer}"


@dataclass(frozen=True)
class Part:
    """A module of a decoder layer that belongs to one sub-layer only."""

    path: str
    """Path of the module within the decoder layer."""
    adds: bool
    """Whether the module's output is added to the hidden state; else another part reads it."""
    num_outputs: int | None
    """Length of the tuple that the module returns, whose first entry counts; None for a tensor."""


@dataclass(frozen=True)
class Sublayer:
    """One residual step of a decoder layer."""

    name: SublayerName
    parts: tuple[Part, ...]
    """Parts in the order in which they run: norms before, the mixer or MLP, modules after it."""


@dataclass(frozen=True)
class LayerSteps:
    """The residual steps of one decoder layer, in order.

    Sequential steps are y = m + f(m) with m = x + g(x), as in most families. Parallel steps are
    y = x + g(x) + f(x), as in GPT-NeoX, Phi or Falcon. A layer may have one step (Mamba,
    Nemotron-H).
    """

    sublayers: tuple[Sublayer, ...]
    parallel: bool
    entry: str | None
    """Path of the first module that reads the state between two sequential steps; None without."""


@dataclass(frozen=True)
class SublayerMap:
    """All residual steps of a model, layer by layer."""

    layers: tuple[LayerSteps, ...]

    def __iter__(self) -> Iterator[Sublayer]:
        """Iterate over all sub-layers in the order of `names`."""
        return (sublayer for steps in self.layers for sublayer in steps.sublayers)

    @property
    def names(self) -> tuple[SublayerName, ...]:
        """Names of all sub-layers in order of depth: attention 0, mlp 0, attention 1, ..."""
        return tuple(sublayer.name for sublayer in self)

    def chosen(self, names: Collection[tuple[int, str]]) -> list[Sublayer]:
        """The sub-layers with these names, in order of depth.

        Raises:
            SimdiffError: a name does not exist or occurs twice, or there are no names or all.
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
    """Refuse a unit that is not in `UNITS`.

    Raises:
        SimdiffError: names the valid units.
    """
    if unit not in UNITS:
        raise SimdiffError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")


def unit_includes(unit: str, name: SublayerName) -> bool:
    """Whether a plan of this unit may remove a sub-layer of this name."""
    return unit in (ALL_KINDS, name.kind)


def find_sublayers(model: PreTrainedModel) -> SublayerMap:
    """Find the attention and MLP sub-layers of every decoder layer.

    They are found by what they do, not by names of modules. The model reads six tokens, the tensors
    passed between the modules of each decoder layer show which belong together, and the layer is
    run without each group. A group is a residual step if the hidden state stays the same to the
    last bit without it. It is attention if its output for the other tokens changes when the first
    token does.

    Args:
        model: a causal language model of transformers.

    Raises:
        SimdiffError: a layer has another structure; its class is named.
    """
    from simdiff.models.running import evaluating
    from simdiff.models.structure import find_decoder_layers
    from simdiff.sublayers.probe import layer_steps, recorded_inputs

    layers: nn.ModuleList = find_decoder_layers(model).modules
    with evaluating(model):
        inputs = recorded_inputs(model, layers)
        return SublayerMap(
            tuple(layer_steps(index, layer, *inputs[index]) for index, layer in enumerate(layers))
        )
