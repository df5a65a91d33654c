"""Forward hooks that feed what enters and leaves each decoder layer to the running scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from simdiff.errors import SimdiffError


class LayerTaker(Protocol):
    """What is fed with every layer: `RunningScores`, or the same by groups of sequences."""

    num_layers: int

    def update(self, layer: int, before: Tensor, after: Tensor, mask: Tensor | None = None) -> None:
        """Take the tokens of a batch before and after one layer."""


class BlocksTaker(Protocol):
    """What is fed with all hidden states of a batch: `RunningBlockScores`, or that by groups."""

    num_layers: int

    def update(self, states: Sequence[Tensor], mask: Tensor | None = None) -> None:
        """Take the hidden states of a batch."""


class LayerHooks:
    """While entered, every forward of the given layers updates `scores`; then all hooks go.

    The hidden states are those of the layers themselves, so the last layer is measured before
    the model's final norm. A layer may return a tensor or a tuple that starts with one.

    Args:
        layers: decoder layers in order; layer i feeds `scores.update(i, ...)`.
        scores: has one state per layer.
        blocks: takes all hidden states of a batch when its last layer has run; they are held until
            then, those of one batch. None scores no blocks.

    Usage::

        with LayerHooks(model.model.layers, scores) as hooks:
            for batch in batches:
                hooks.attention_mask = batch["attention_mask"]
                model.model(**batch, use_cache=False)
    """

    def __init__(
        self,
        layers: Sequence[nn.Module] | nn.ModuleList,
        scores: LayerTaker,
        blocks: BlocksTaker | None = None,
    ) -> None:
        """Prepare; nothing is registered yet."""
        if len(layers) != scores.num_layers:
            raise SimdiffError(
                f"LayerHooks: scores must have {len(layers)} layers like the model, "
                f"got {scores.num_layers}"
            )
        self.attention_mask: Tensor | None = None
        """Of the batch about to run, `(batch, sequence)`, 0 for padding; None counts all."""
        self.token_shape: tuple[int, ...] | None = None
        """`(batch, sequence)` of the batch about to run: tells streams from tokens."""
        self._layers = layers
        self._scores = scores
        self._blocks = blocks
        self._states: list[tuple[Tensor, int | None]] = []
        self._handles: list[Any] = []
        self._versions: dict[int, int | None] = {}

    def __enter__(self) -> LayerHooks:
        """Register the hooks."""
        try:
            for index, layer in enumerate(self._layers):
                self._handles.append(
                    layer.register_forward_pre_hook(self._before(index), with_kwargs=True)
                )
                self._handles.append(
                    layer.register_forward_hook(self._after(index), with_kwargs=True)
                )
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the hooks, whatever happened."""
        self._remove()

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()
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
            before, after = self._by_token(before), self._by_token(after)
            self._check_tokens(index, before)
            if before.device != after.device:  # the layer was dispatched to another device
                before = before.to(after.device, non_blocking=True)
            with torch.no_grad():
                self._scores.update(index, before, after, self._mask_for(before))
                if self._blocks is not None:
                    self._collect(index, before, after, self._blocks)

        return hook

    def _by_token(self, states: Tensor) -> Tensor:
        """Several streams side by side (Gemma 3n, DeepSeek-V4) as one long state of each token."""
        if self.token_shape is None or states.dim() != len(self.token_shape) + 2:
            return states
        if tuple(states.shape[1:-1]) == self.token_shape:  # (streams, batch, sequence, hidden)
            states = states.movedim(0, -2)
        elif tuple(states.shape[:-2]) != self.token_shape:
            return states
        return states.flatten(-2)

    def _check_tokens(self, index: int, states: Tensor) -> None:
        """CPM-Ant puts prompts before the tokens, ProphetNet predicts several at each position."""
        shape = self.token_shape
        if shape is not None and states.numel() != math.prod(shape) * states.shape[-1]:
            raise SimdiffError(
                f"layer {index} must receive one hidden state for each token of input_ids "
                f"{shape}, got shape {tuple(states.shape)}: this model cannot be scored, since "
                "its further states belong to no token of the text"
            )

    def _collect(self, index: int, before: Tensor, after: Tensor, blocks: BlocksTaker) -> None:
        """Keep the state that leaves a layer; after the last one, score all pairs of states."""
        if index == 0:
            self._states = [(before, _version(before))]
        due = max(len(self._states) - 1, 0)
        if index != due or not self._states:
            raise SimdiffError(
                f"LayerHooks: every layer must run once and in order to score blocks, got layer "
                f"{index} where layer {due} was due"
            )
        self._states.append((after, _version(after)))
        if len(self._states) <= blocks.num_layers:
            return
        for state, (tensor, version) in enumerate(self._states):
            if _version(tensor) != version:
                raise SimdiffError(
                    f"LayerHooks: hidden state {state} was written over after its layer had run: "
                    "blocks cannot be scored"
                )
        first = self._states[0][0]
        mask = self._mask_for(first)
        # Layers on several devices: all pairs meet where the last layer lives.
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


def entering(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state that enters layer `index`, from the arguments of its forward.

    Raises:
        SimdiffError: it is neither the first one nor called `hidden_states`.
    """
    states = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(states, Tensor):
        raise SimdiffError(
            f"layer {index} must receive its hidden state first or as hidden_states, "
            f"got {type(states).__name__} and keywords {sorted(kwargs)}"
        )
    return states


def leaving(index: int, output: Any) -> Tensor:
    """The hidden state that leaves layer `index`, from what its forward returned.

    Raises:
        SimdiffError: it returned neither a tensor nor a tuple that starts with one.
    """
    # transformers 5 layers return a tensor, earlier ones a tuple: indexing a tensor would
    # silently take the first sequence of the batch.
    states = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(states, Tensor):
        raise SimdiffError(
            f"layer {index} must return a tensor or a tuple that starts with one, "
            f"got {type(output).__name__}"
        )
    return states


def _version(states: Tensor) -> int | None:
    """Counts in-place writes; tensors made in inference mode do not have it."""
    return None if states.is_inference() else states._version
