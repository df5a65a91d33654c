"""Find out how the modules of a decoder layer work together, from the tensors between them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models.layer_calls import entering, leaving
from simdiff.models.structure import decoder_body
from simdiff.sublayers.stand_ins import first_states, replaced_by_stand_ins
from simdiff.sublayers.structure import ATTENTION, MLP, LayerSteps, Part, Sublayer, SublayerName

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_NUM_TOKENS = 6

# If the first token changes, the output of attention at the other tokens changes by a large share
# of itself. The output of an MLP stays the same there, except for the rounding of experts that get
# other tokens (bfloat16: 0.01).
_MIXING = 0.05

# Units of rounding by which x + g(x) + f(x) may differ between the orders of its two additions.
_ROUNDINGS = 4


@dataclass(frozen=True)
class _Call:
    """One call of a module of the layer: the states that entered it, and its output."""

    path: str
    parent: int | None
    """Index of the call whose output entered the module; -1 for the layer's input, None for a state
    that no module returned."""
    source: Tensor
    output: Tensor
    num_outputs: int | None


@dataclass(frozen=True)
class _Trace:
    """The record of one forward of a layer: its input, its module calls, its output."""

    entered: Tensor
    calls: list[_Call]
    left: Tensor

    def source(self, path: str) -> Tensor:
        """The states that entered a module in its first call, in the shape of the hidden state."""
        call = next(call for call in self.calls if call.path == path)
        return call.source.reshape(self.entered.shape)

    def added(self, parts: Iterable[Part]) -> Tensor:
        """The sum of those outputs of parts that are added to the hidden state."""
        paths = {part.path for part in parts if part.adds}
        outputs = [call.output for call in self.calls if call.path in paths]
        return torch.stack([output.reshape(self.entered.shape) for output in outputs]).sum(0)


def few_tokens(model: PreTrainedModel) -> Tensor:
    """Ids `(1, 6)` by which the layers are found out."""
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(1, _NUM_TOKENS + 1, device=embedding.device) * 7919 % len(embedding)
    return ids[None]


@torch.no_grad()
def recorded_inputs(model: PreTrainedModel, layers: nn.ModuleList) -> list[Arguments]:
    """The arguments of each decoder layer's call when the model reads a few tokens."""
    inputs: list[Arguments] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append((args, dict(kwargs))), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        decoder_body(model)(input_ids=few_tokens(model), use_cache=False)
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
    """Find the residual steps of one decoder layer.

    Args:
        index: index of the layer.
        layer: the layer, as part of its model.
        args, kwargs: the arguments that the model passes to it for a few tokens.

    Raises:
        SimdiffError: the sub-layers do not add what they return to the hidden state.
    """
    probe = _Probe(index, layer, (args, kwargs))
    steps = None
    if entering(index, args, kwargs).dim() == 3:  # else there are several residual streams
        # A layer with another structure may fail in any way when its modules are replaced.
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
        """Explain the layer as y = m + f(m), m = x + g(x); None if that does not hold.

        The second step starts at a module that reads a state which no module returned: m.
        """
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
        """Whether removing either step leaves the hidden state unchanged, to the last bit."""
        middle = self._dense.source(entry)
        without_first = self._trace(removed=first)
        if not torch.equal(without_first.source(entry), self._dense.entered):
            return False
        return torch.equal(self._trace(removed=second).left, middle)

    def parallel(self) -> LayerSteps | None:
        """Explain the layer as y = x + g(x), or y = x + g(x) + f(x); None if neither holds.

        Calls form a tree: the parent of a call is the call whose output it reads, and -1 stands for
        the layer's input. A branch is the set of calls that lead to one last call, whose output no
        other call reads.
        """
        everything = range(len(self._dense.calls))
        whole = self._parts(everything)
        if not whole or not torch.equal(self._trace(removed=whole).left, self._dense.entered):
            return None
        # From here on: without its modules the layer returns its input, to the last bit. So the
        # output is the input plus what the branches add.
        ancestors = {last: self._ancestors(last) for last in self._last(everything)}
        if any(self._dense.calls[min(members)].parent != -1 for members in ancestors.values()):
            return None
        # Every branch starts at the layer's input, so no branch depends on what another adds. The
        # kind of a branch is told by its own modules; those shared with other branches (a norm
        # before attention and MLP) belong to none.
        kinds = {last: self._kind(self._parts_of_one(last, ancestors), ()) for last in ancestors}
        if None in kinds.values():
            return None
        calls_by_kind = {
            kind: {call for last in kinds if kinds[last] == kind for call in ancestors[last]}
            for kind in (ATTENTION, MLP)
        }
        # Several branches of one kind (attention beside a state space model) are one sub-layer. If
        # only one kind occurs, the whole layer is that sub-layer, shared modules included.
        if not calls_by_kind[ATTENTION] or not calls_by_kind[MLP]:
            kind = ATTENTION if calls_by_kind[ATTENTION] else MLP
            return LayerSteps((self._sublayer(kind, whole),), False, None)
        # Both kinds occur: modules that serve both stay with neither, so that either sub-layer can
        # be removed without the other. `_adds` proves that either alone adds its own outputs.
        attention = self._parts(calls_by_kind[ATTENTION] - calls_by_kind[MLP])
        mlp = self._parts(calls_by_kind[MLP] - calls_by_kind[ATTENTION])
        if not attention or not mlp or not self._adds(attention, mlp):
            return None
        sublayers = self._sublayer(ATTENTION, attention), self._sublayer(MLP, mlp)
        return LayerSteps(sublayers, True, None)

    def _parts_of_one(self, last: int, ancestors: dict[int, set[int]]) -> tuple[Part, ...]:
        """The parts that lead to one last call and to no other."""
        others = [members for other, members in ancestors.items() if other != last]
        return self._parts(ancestors[last].difference(*others))

    def _adds(self, attention: tuple[Part, ...], mlp: tuple[Part, ...]) -> bool:
        """Whether each sub-layer alone adds what its parts return, up to rounding.

        The hooks that score parallel layers rely on it.
        """
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
        """The kind of the parts that add to the hidden state; None if they differ in kind.

        It is attention if what is added to the other tokens changes when the first token does.
        """
        plain, other = self._trace(removed=before), self._trace(removed=before, shifted=True)
        kinds = set()
        for part in parts:
            if part.adds:
                value, changed = (trace.added([part])[:, 1:] for trace in (plain, other))
                size = value.abs().max()
                if size == 0:  # it adds nothing: only its use of the cache tells its kind
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
        """The calls whose output no other call reads."""
        parents = {self._dense.calls[member].parent for member in members}
        return [member for member in members if member not in parents]

    def _parts(self, members: Collection[int]) -> tuple[Part, ...]:
        """The modules that run only in these calls; empty if a branch does not end in one."""
        calls = self._dense.calls
        outside = {call.path for index, call in enumerate(calls) if index not in members}
        adding = set()
        for last in self._last(members):
            # A shared module at the end, such as a dropout, turns zeros into zeros, so that the
            # module before it is the one whose output counts as added.
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
        """Run the layer without some parts, on its input or with its first token changed."""
        args, kwargs = self._inputs
        states = entering(self._index, args, kwargs)
        if shifted:
            # Rolled, not negated: a gate that multiplies two projections cancels a sign.
            changed = states.clone()
            changed[:, 0] = changed[:, 0].roll(1, -1)
            args = (changed, *args[1:]) if args else args
            kwargs = kwargs if args else {**kwargs, "hidden_states": changed}
            states = changed
        gone = Sublayer(SublayerName(self._index, ATTENTION), removed)
        with replaced_by_stand_ins({self._index: self._layer}, [gone]):
            recorder = _Recorder(self._layer, states)
            try:
                output = self._layer(*args, **kwargs)
            finally:
                recorder.stop()
        return _Trace(states, recorder.calls, leaving(self._index, output))


class _Recorder:
    """Records the calls of a layer's modules until it is stopped."""

    def __init__(self, layer: nn.Module, entered: Tensor) -> None:
        self.calls: list[_Call] = []
        self._producer = {_place(entered): -1}
        self._alive: list[Tensor] = []  # keeps tensors alive, so that no address is used twice
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
            # Cloned because Falcon adds the attention's output to the MLP's in place.
            self.calls.append(_Call(path, parent, source, states.clone(), length))

        return hook


def _modules(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a layer calls itself: its children, and the members of its module lists."""
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
    """The place of a tensor in memory, which is the same for views of another shape."""
    memory = states.untyped_storage().data_ptr()
    return states.device, memory, states.storage_offset(), states.numel()
