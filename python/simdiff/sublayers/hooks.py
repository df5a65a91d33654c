"""Forward hooks that pass the states around each attention and MLP to running scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models.layer_calls import HookHandles, entering, leaving
from simdiff.models.structure import decoder_body, find_decoder_layers
from simdiff.sublayers.stand_ins import first_states
from simdiff.sublayers.structure import ATTENTION, MLP, LayerSteps, Sublayer, SublayerMap
from simdiff_kernels import RunningScores, TokenMetrics, token_metrics


class SublayerHooks(HookHandles):
    """Context manager in which every forward of the decoder updates the scores of its sub-layers.

    For each sub-layer the hidden state before and after its contribution is compared; post-norms
    and multipliers belong to the contribution. In sequential layers, m = x + g(x) and y = m + f(m),
    attention is (x, m) and MLP (m, y). The state m is the input of the second sub-layer, so nothing
    is computed for it. In parallel layers, y = x + g(x) + f(x), there is no state between the two.
    Each counts as the last to be added, which is what its removal undoes: attention is
    (x + f(x), y) and MLP (x + g(x), y).

    The hooks hold at most one state more than the forward itself, two for parallel layers, and
    never wait for the device.

    Args:
        model: the model whose decoder runs.
        found: the sub-layers of the model.
        scores: running scores with one state for each of `found.names`.
        norm_changes: receives the same states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        found: SublayerMap,
        scores: RunningScores,
        norm_changes: RunningNormChanges,
    ) -> None:
        """Store the arguments; no hook is registered yet."""
        super().__init__()
        if scores.num_layers != len(found.names):
            raise SimdiffError(
                f"SublayerHooks: scores must have {len(found.names)} states, one for each "
                f"sub-layer, got {scores.num_layers}"
            )
        self._model = model
        self._found = found
        self._scores = scores
        self._norm_changes = norm_changes
        self._mask: Tensor | None = None

    def _register(self) -> Iterator[RemovableHandle]:
        body = decoder_body(self._model)
        yield body.register_forward_pre_hook(self._begin, with_kwargs=True)
        layers = find_decoder_layers(self._model).modules
        first = 0
        for layer, steps in zip(layers, self._found.layers, strict=True):
            yield from LayerWatch(self, first, steps).register(layer)
            first += len(steps.sublayers)

    def _begin(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.begin(kwargs.get("attention_mask"))

    def begin(self, mask: Tensor | None) -> None:
        """Take the mask of the batch whose states come next."""
        self._mask = mask

    @torch.no_grad()
    def update(self, index: int, before: Tensor, after: Tensor) -> None:
        """Add the tokens of one batch to the state of one sub-layer."""
        if before.device != after.device:  # the layer was dispatched to another device
            before = before.to(after.device, non_blocking=True)
        mask = self._mask
        if mask is not None:
            if mask.device != after.device:
                self._mask = mask = mask.to(after.device, non_blocking=True)
            mask = mask.bool().reshape(after.shape[:-1])
        self._scores.update(index, before, after, mask)
        self._norm_changes.update(index, token_metrics(before, after), mask)


class LayerWatch:
    """Hooks of one layer; they hold its states no longer than needed.

    Args:
        hooks: receive what is seen.
        first: index of the layer's first sub-layer.
        steps: of the layer.
    """

    def __init__(self, hooks: SublayerHooks, first: int, steps: LayerSteps) -> None:
        """Store the arguments; no hook is registered yet."""
        self._hooks = hooks
        self._first = first
        self._steps = steps
        self._before: tuple[Tensor, int | None] | None = None
        self._alone: dict[str, Tensor] = {}  # by kind, in parallel layers

    def register(self, layer: nn.Module) -> Iterator[RemovableHandle]:
        """Register all hooks."""
        yield layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        yield layer.register_forward_hook(self._leave)
        yield from self.register_inside(layer)

    def register_inside(self, layer: nn.Module) -> Iterator[RemovableHandle]:
        """Register hooks on what lies in the layer; `enter` and `leave` are to be called."""
        if self._steps.entry is not None:
            entry = layer.get_submodule(self._steps.entry)
            yield entry.register_forward_pre_hook(self._pass, with_kwargs=True)
        elif self._steps.parallel:
            for sublayer in self._steps.sublayers:
                yield from self._follow(layer, sublayer)

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.enter(entering(self._first, args, kwargs))

    def enter(self, states: Tensor) -> None:
        """States enter the layer."""
        self._hold(states)
        self._alone.clear()

    def _pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Score the first step and hold the state between the two steps."""
        states = first_states(args, kwargs)
        assert states is not None  # the probe found one
        before = self._release()
        states = states.view(before.shape)
        self._hooks.update(self._first, before, states)
        self._hold(states)

    def _follow(self, layer: nn.Module, sublayer: Sublayer) -> Iterator[RemovableHandle]:
        """Register hooks that compute the layer's input plus one parallel sub-layer's output."""
        kind = sublayer.name.kind

        def added(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            state = self._alone.get(kind)
            state = self._release() if state is None else state
            # Summed at once, since Falcon later adds the attention's output to the MLP's in place.
            self._alone[kind] = state + output.detach().view(state.shape)

        for part in sublayer.parts:
            if part.adds:
                yield layer.get_submodule(part.path).register_forward_hook(added)

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.leave(leaving(self._first, output))

    def leave(self, after: Tensor) -> None:
        """States leave the layer."""
        before = self._release()
        if self._steps.parallel:
            # The state before the one sub-layer is the input plus the other alone.
            for index, kind in enumerate((MLP, ATTENTION)):
                self._hooks.update(self._first + index, self._alone.pop(kind), after)
        else:
            self._hooks.update(self._first + len(self._steps.sublayers) - 1, before, after)
        self._before = None

    def _hold(self, states: Tensor) -> None:
        self._before = states, None if states.is_inference() else states._version

    def _release(self) -> Tensor:
        assert self._before is not None  # `_hold` has been called
        states, version = self._before
        if not states.is_inference() and states._version != version:
            raise SimdiffError(
                f"{self._steps.sublayers[0].name} writes over the hidden state that enters it, "
                "so what it was is lost: it cannot be scored"
            )
        return states


class RunningNormChanges:
    """Running means over tokens of the norm change of every sub-layer.

    The norm change is (b - a)^2 / (2 a b) with the norms a before and b after. Zero vectors are
    treated as in `simdiff.scoring.running_block_groups`. Sums are float64, on the states' device.
    """

    def __init__(self, num_units: int) -> None:
        """Start with no tokens seen."""
        self._sums: list[Tensor | None] = [None] * num_units

    def update(self, index: int, metrics: TokenMetrics, mask: Tensor | None = None) -> None:
        """Add the tokens of one batch; those with a non-finite norm are left out.

        Args:
            index: index of the sub-layer.
            metrics: metrics of each token, `(...)`.
            mask: `(...)`, zero leaves a token out.
        """
        before, after = metrics.norm_before.double(), metrics.norm_after.double()
        used = (before * after).isfinite()
        if mask is not None:
            used = used & mask
        product = 2 * before * after
        change = (after - before).square() / product
        alone = (before == 0) != (after == 0)
        change = torch.where(product == 0, alone.double(), change)
        sums = torch.stack([torch.where(used, change, 0.0).sum(), used.sum().double()])
        old = self._sums[index]
        self._sums[index] = sums if old is None else old.to(sums.device) + sums

    def finish(self) -> tuple[float, ...]:
        """The mean norm change of every sub-layer.

        Raises:
            ValueError: a sub-layer has no token to average.
        """
        means = []
        for index, sums in enumerate(self._sums):
            total, count = (0.0, 0.0) if sums is None else sums.tolist()
            if count == 0:
                raise ValueError(
                    f"RunningNormChanges.finish: sub-layer {index} must have at least one token"
                )
            means.append(total / count)
        return tuple(means)
