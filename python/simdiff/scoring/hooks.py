"""Forward hooks that pass the states before and after each decoder layer to running scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from simdiff.errors import SimdiffError
from simdiff.models.layer_calls import HookHandles, entering, leaving


class LayerSink(Protocol):
    """Receives the states around every layer, as `RunningScores` and `RunningGroups` do."""

    num_layers: int

    def update(self, layer: int, before: Tensor, after: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens of a batch, by their states before and after one layer."""


class BlockSink(Protocol):
    """Receives all hidden states of a batch, as `RunningBlockScores` does."""

    num_layers: int

    def update(self, states: Sequence[Tensor], mask: Tensor | None = None) -> None:
        """Add the tokens of a batch, by the hidden states before, between and after all layers."""


class LayerHooks(HookHandles):
    """Context manager in which every forward of the given layers updates `scores`.

    The hidden states are those of the layers themselves, so the last layer is measured before
    the model's final norm. A layer may return a tensor or a tuple that starts with one. All hooks
    are removed at the end of the with block.

    Args:
        layers: decoder layers in order; layer i calls `scores.update(i, ...)`.
        scores: running scores with one state per layer.
        blocks: receives all hidden states of a batch after its last layer; they are held in memory
            until then. None scores no blocks.

    Usage::

        with LayerHooks(model.model.layers, scores) as hooks:
            for batch in batches:
                hooks.attention_mask = batch["attention_mask"]
                model.model(**batch, use_cache=False)
    """

    def __init__(
        self,
        layers: Sequence[nn.Module] | nn.ModuleList,
        scores: LayerSink,
        blocks: BlockSink | None = None,
    ) -> None:
        """Store the arguments; no hook is registered yet."""
        super().__init__()
        if len(layers) != scores.num_layers:
            raise SimdiffError(
                f"LayerHooks: scores must have {len(layers)} layers like the model, "
                f"got {scores.num_layers}"
            )
        self.attention_mask: Tensor | None = None
        """Mask of the next batch, `(batch, sequence)`, 0 for padding; None counts all tokens."""
        self.token_shape: tuple[int, ...] | None = None
        """Shape `(batch, sequence)` of the next batch; tells parallel streams from tokens."""
        self._layers = layers
        self._scores = scores
        self._blocks = blocks
        self._states: list[tuple[Tensor, int | None]] = []
        self._versions: dict[int, int | None] = {}

    def _register(self) -> Iterator[RemovableHandle]:
        for index, layer in enumerate(self._layers):
            yield layer.register_forward_pre_hook(self._before(index), with_kwargs=True)
            yield layer.register_forward_hook(self._after(index), with_kwargs=True)

    def _remove(self) -> None:
        super()._remove()
        self._states.clear()

    def _before(self, index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._versions[index] = _version(entering(index, args, kwargs))

        return hook

    def _after(self, index: int) -> Any:
        def hook(
            layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            before, after = entering(index, args, kwargs), leaving(index, output)
            if _version(before) != self._versions.pop(index, None):
                raise SimdiffError(
                    f"layer {index} ({type(layer).__name__}) writes its output over its input, "
                    "so what entered it is lost: it cannot be scored"
                )
            self.measure(index, before, after)

        return hook

    def measure(self, index: int, before: Tensor, after: Tensor) -> None:
        """Score a layer by the states before and after it, and the blocks after the last one."""
        before, after = self._by_token(before), self._by_token(after)
        self._check_tokens(index, before)
        if before.device != after.device:  # the layer was dispatched to another device
            before = before.to(after.device, non_blocking=True)
        with torch.no_grad():
            self._scores.update(index, before, after, self._mask_for(before))
            if self._blocks is not None:
                self._collect(index, before, after, self._blocks)

    def _by_token(self, states: Tensor) -> Tensor:
        """Join parallel residual streams (Gemma 3n, DeepSeek-V4) to one long state per token."""
        if self.token_shape is None or states.dim() != len(self.token_shape) + 2:
            return states
        if tuple(states.shape[1:-1]) == self.token_shape:  # (streams, batch, sequence, hidden)
            states = states.movedim(0, -2)
        elif tuple(states.shape[:-2]) != self.token_shape:
            return states
        return states.flatten(-2)

    def _check_tokens(self, index: int, states: Tensor) -> None:
        """Refuse states that belong to no token of the text.

        CPM-Ant puts prompts before the tokens, ProphetNet predicts several tokens per position.
        """
        shape = self.token_shape
        if shape is not None and states.numel() != math.prod(shape) * states.shape[-1]:
            raise SimdiffError(
                f"layer {index} must receive one hidden state for each token of input_ids "
                f"{shape}, got shape {tuple(states.shape)}: this model cannot be scored, since "
                "its further states belong to no token of the text"
            )

    def _collect(self, index: int, before: Tensor, after: Tensor, blocks: BlockSink) -> None:
        """Keep the state that leaves a layer; after the last layer, score all pairs of states."""
        # `_states` holds h_0 ... h_i, the states before and after the layers 0 ... i - 1 that have
        # run in this batch. A forward that was interrupted leaves some; layer 0 starts anew.
        if index == 0:
            self._states = [(before, _version(before))]
        # Layer `due` is the next one. Any other means that a layer was skipped, or that it ran
        # twice: h_i would not be the state before layer i.
        due = max(len(self._states) - 1, 0)
        if index != due or not self._states:
            raise SimdiffError(
                f"LayerHooks: every layer must run once and in order to score blocks, got layer "
                f"{index} where layer {due} was due"
            )
        self._states.append((after, _version(after)))
        if len(self._states) <= blocks.num_layers:
            return
        # All L + 1 states are there, but they are references, not copies: a later layer may have
        # written over one in place, which its version number shows.
        for state, (tensor, version) in enumerate(self._states):
            if _version(tensor) != version:
                raise SimdiffError(
                    f"LayerHooks: hidden state {state} was written over after its layer had run: "
                    "blocks cannot be scored"
                )
        first = self._states[0][0]
        mask = self._mask_for(first)
        # If the layers are on several devices, all states are brought to that of the last layer.
        states = [tensor.to(after.device, non_blocking=True) for tensor, _ in self._states]
        self._states.clear()
        mask = None if mask is None else mask.to(after.device)
        blocks.update(states, mask)

    def _mask_for(self, states: Tensor) -> Tensor | None:
        if self.attention_mask is None:
            return None
        if self.attention_mask.numel() * states.shape[-1] != states.numel():
            raise SimdiffError(
                f"LayerHooks: attention_mask must have one entry for each token of the hidden "
                f"states {tuple(states.shape)}, got shape {tuple(self.attention_mask.shape)}"
            )
        if self.attention_mask.device != states.device:
            self.attention_mask = self.attention_mask.to(states.device, non_blocking=True)
        return self.attention_mask.reshape(states.shape[:-1])


def _version(states: Tensor) -> int | None:
    """The number of in-place writes to a tensor; None in inference mode, which does not count."""
    return None if states.is_inference() else states._version
