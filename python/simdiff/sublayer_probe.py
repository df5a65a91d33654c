"""How the modules of a decoder layer work together, told by what flows between them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.hooks import entering, leaving
from simdiff.models import decoder_body
from simdiff.sublayer_standins import first_states, standing_in
from simdiff.sublayers import ATTENTION, MLP, LayerSteps, Part, Sublayer, SublayerName

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_NUM_TOKENS = 6

# Another first token changes an attention's output at the others by a large part of itself; an
# MLP's stays, but for the rounding of experts that are given other tokens (bfloat16: 0.01).
_MIXING = 0.05

# x + g(x) + f(x) is two additions, whichever way round.
_ROUNDINGS = 4


@dataclass(frozen=True)
class _Call:
    """One module of a layer that ran: what entered it, and what it returned."""

    path: str
    parent: int | None
    """The call whose output entered it, -1 for the layer's input; None for what is new."""
    source: Tensor
    output: Tensor
    num_outputs: int | None


@dataclass(frozen=True)
class _Trace:
    """One forward of a layer."""

    entered: Tensor
    calls: list[_Call]
    left: Tensor

    def source(self, path: str) -> Tensor:
        """What entered a module first, in the shape of the hidden state."""
        call = next(call for call in self.calls if call.path == path)
        return call.source.reshape(self.entered.shape)

    def added(self, parts: Iterable[Part]) -> Tensor:
        """The sum of what parts return to be added to the hidden state."""
        paths = {part.path for part in parts if part.adds}
        outputs = [call.output for call in self.calls if call.path in paths]
        return torch.stack([output.reshape(self.entered.shape) for output in outputs]).sum(0)


@torch.no_grad()
def recorded_inputs(model: PreTrainedModel, layers: nn.ModuleList) -> list[Arguments]:
    """What enters each decoder layer when the model reads a few tokens."""
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(1, _NUM_TOKENS + 1, device=embedding.device) * 7919 % len(embedding)
    inputs: list[Arguments] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append((args, dict(kwargs))), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        decoder_body(model)(input_ids=ids[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if len(inputs) != len(layers):
        raise SimdiffError(
            f"find_sublayers: every decoder layer must run once in a forward, got {len(inputs)} "
            f"runs of {len(layers)} layers"
        )
    return inputs


@torch.no_grad()
def layer_steps(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: Any) -> LayerSteps:
    """The residual steps of one decoder layer.

    Args:
        index: of the layer.
        layer: as it stands in its model.
        args, kwargs: what its model gives it, for a few tokens.

    Raises:
        SimdiffError: its sub-layers do not add what they return to the hidden state.
    """
    probe = _Probe(index, layer, (args, kwargs))
    steps = None
    if entering(index, args, kwargs).dim() == 3:  # several streams are no single residual
        # A layer that is built otherwise may fail in any way once modules are replaced.
        try:
            steps = probe.sequential() or probe.parallel()
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, StopIteration):
            steps = None
    if steps is None:
        raise SimdiffError(
            f"layer {index} ({type(layer).__name__}): its attention and its MLP must each add "
            "what they return to the hidden state, in sequence or in parallel, and this class does "
            "something else: its sub-layers can be neither scored nor removed (whole layers can)"
        )
    return steps


class _Probe:
    """Tries to explain one decoder layer as residual steps."""

    def __init__(self, index: int, layer: nn.Module, inputs: Arguments) -> None:
        self._index = index
        self._layer = layer
        self._inputs = inputs
        self._dense = self._trace()

    def sequential(self) -> LayerSteps | None:
        """Two steps, the second of which starts from a state that is new."""
        calls = self._dense.calls
        for split, call in enumerate(calls):
            known = call.path in {earlier.path for earlier in calls[:split]}
            if split == 0 or call.parent is not None or known:
                continue
            if call.source.numel() != self._dense.entered.numel():
                continue
            first, second = self._parts(range(split)), self._parts(range(split, len(calls)))
            if first and second and self._holds(first, second, call.path):
                kinds = [self._kind(first, ()), self._kind(second, first)]
                if sorted(map(str, kinds)) != [ATTENTION, MLP]:
                    return None
                sublayers = [
                    self._sublayer(str(kind), parts)
                    for kind, parts in zip(kinds, (first, second), strict=True)
                ]
                return LayerSteps(tuple(sublayers), False, call.path)
        return None

    def _holds(self, first: tuple[Part, ...], second: tuple[Part, ...], entry: str) -> bool:
        """Without a step the hidden state stays as it was, to the last bit."""
        middle = self._dense.source(entry)
        without_first = self._trace(removed=first)
        if not torch.equal(without_first.source(entry), self._dense.entered):
            return False
        return torch.equal(self._trace(removed=second).left, middle)

    def parallel(self) -> LayerSteps | None:
        """One step, or two that start from the layer's input."""
        everything = range(len(self._dense.calls))
        whole = self._parts(everything)
        if not whole or not torch.equal(self._trace(removed=whole).left, self._dense.entered):
            return None
        ancestors = {last: self._ancestors(last) for last in self._last(everything)}
        if any(self._dense.calls[min(members)].parent != -1 for members in ancestors.values()):
            return None
        kinds = {last: self._kind(self._own(last, ancestors), ()) for last in ancestors}
        if None in kinds.values():
            return None
        of = {
            kind: {call for last in kinds if kinds[last] == kind for call in ancestors[last]}
            for kind in (ATTENTION, MLP)
        }
        if not of[ATTENTION] or not of[MLP]:
            kind = ATTENTION if of[ATTENTION] else MLP
            return LayerSteps((self._sublayer(kind, whole),), False, None)
        attention = self._parts(of[ATTENTION] - of[MLP])
        mlp = self._parts(of[MLP] - of[ATTENTION])
        if not attention or not mlp or not self._adds(attention, mlp):
            return None
        sublayers = self._sublayer(ATTENTION, attention), self._sublayer(MLP, mlp)
        return LayerSteps(sublayers, True, None)

    def _own(self, last: int, ancestors: dict[int, set[int]]) -> tuple[Part, ...]:
        """The parts that lead to one of the last calls alone."""
        others = [members for other, members in ancestors.items() if other != last]
        return self._parts(ancestors[last].difference(*others))

    def _adds(self, attention: tuple[Part, ...], mlp: tuple[Part, ...]) -> bool:
        """Each alone adds what its parts return, so that both can be scored from it."""
        for alone, other in ((attention, mlp), (mlp, attention)):
            state, added = self._dense.entered, self._dense.added(alone)
            slack = _ROUNDINGS * torch.finfo(state.dtype).eps * (state.abs() + added.abs())
            left = self._trace(removed=other).left
            if not bool(((left - (state + added)).abs() <= slack).all()):
                return False
        return True

    def _sublayer(self, kind: str, parts: tuple[Part, ...]) -> Sublayer:
        return Sublayer(SublayerName(self._index, kind), parts)

    def _kind(self, parts: tuple[Part, ...], before: tuple[Part, ...]) -> str | None:
        """Attention if what is added to other tokens changes with the first one; None if unlike."""
        plain, other = self._trace(removed=before), self._trace(removed=before, shifted=True)
        kinds = set()
        for part in parts:
            if part.adds:
                value, changed = (trace.added([part])[:, 1:] for trace in (plain, other))
                size = value.abs().max()
                if size == 0:  # it adds nothing: only what it asks of the cache tells
                    mixes = hasattr(self._layer.get_submodule(part.path), "layer_idx")
                else:
                    mixes = bool((changed - value).abs().max() > _MIXING * size)
                kinds.add(ATTENTION if mixes else MLP)
        return kinds.pop() if len(kinds) == 1 else None

    def _ancestors(self, call: int) -> set[int]:
        found, parent = {call}, self._dense.calls[call].parent
        while parent is not None and parent >= 0:
            found.add(parent)
            parent = self._dense.calls[parent].parent
        return found

    def _last(self, members: Collection[int]) -> list[int]:
        """Calls whose output no other one reads."""
        parents = {self._dense.calls[member].parent for member in members}
        return [member for member in members if member not in parents]

    def _parts(self, members: Collection[int]) -> tuple[Part, ...]:
        """The modules that run in these calls alone; empty if they do not end in such modules."""
        calls = self._dense.calls
        outside = {call.path for index, call in enumerate(calls) if index not in members}
        adding = set()
        for last in self._last(members):
            # What follows and is shared, such as a dropout, makes zeros of zeros.
            while calls[last].path in outside:
                parent = calls[last].parent
                if parent is None or parent not in members:
                    return ()
                last = parent
            adding.add(calls[last].path)
        lengths = {calls[m].path: calls[m].num_outputs for m in sorted(members)}
        return tuple(
            Part(path, path in adding, length)
            for path, length in lengths.items()
            if path not in outside
        )

    def _trace(self, removed: tuple[Part, ...] = (), shifted: bool = False) -> _Trace:
        """Run the layer without some parts, on its input or with the first token changed."""
        args, kwargs = self._inputs
        states = entering(self._index, args, kwargs)
        if shifted:
            changed = states.clone()  # negated, gates that multiply two projections see nothing
            changed[:, 0] = changed[:, 0].roll(1, -1)
            args = (changed, *args[1:]) if args else args
            kwargs = kwargs if args else {**kwargs, "hidden_states": changed}
            states = changed
        gone = Sublayer(SublayerName(self._index, ATTENTION), removed)
        with standing_in({self._index: self._layer}, [gone]):
            recorder = _Recorder(self._layer, states)
            try:
                output = self._layer(*args, **kwargs)
            finally:
                recorder.stop()
        return _Trace(states, recorder.calls, leaving(self._index, output))


class _Recorder:
    """Records the calls of a layer's modules until stopped."""

    def __init__(self, layer: nn.Module, entered: Tensor) -> None:
        self.calls: list[_Call] = []
        self._producer = {_place(entered): -1}
        self._alive: list[Tensor] = []  # so that no memory is used twice
        self._handles = [
            module.register_forward_hook(self._hook(path), with_kwargs=True)
            for path, module in _modules(layer)
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            source = first_states(args, kwargs)
            length = len(output) if isinstance(output, tuple) else None
            states = output[0] if length else output
            if source is None or not isinstance(states, Tensor):
                return
            self._alive += [source, states]
            parent = self._producer.get(_place(source))
            self._producer[_place(states)] = len(self.calls)
            # Falcon adds the attention's output to the MLP's in place.
            self.calls.append(_Call(path, parent, source, states.clone(), length))

        return hook


def _modules(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a layer calls itself: its children, and those in lists of its own."""
    for name, child in layer.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            for inner, path in _modules_of_list(child, name):
                yield path, inner
        else:
            yield name, child


def _modules_of_list(modules: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    for key, module in modules.named_children():
        yield module, f"{name}.{key}"


def _place(states: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies: the same for a view of another shape."""
    memory = states.untyped_storage().data_ptr()
    return states.device, memory, states.storage_offset(), states.numel()
