"""Losses of a model without some layers, which are passed by and not taken out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.evaluation import token_losses, window_loss
from simdiff.models import decoder_body, find_decoder_layers
from simdiff.selection import check_layers

# Of hidden states kept for reuse; 8 windows of 512 tokens of a 7B model in bf16 fill it.
MEMORY_BUDGET = 1 << 30

T = TypeVar("T")


class BypassEvaluator:
    """Losses of the model without any choice of layers, reusing what does not change.

    A layer that is passed by hands on its input; the model, its masks and its positions stay as
    they are, so nothing is rebuilt. The states that enter the layers are kept for one choice, the
    base: another choice re-runs only the layers from the first one on which both differ. The
    result is bitwise that of a forward from the start.

    Args:
        model: causal language model.
        windows: token ids `(num_windows, window_length)`.
        memory_budget: bytes for the states kept; where they do not fit for every layer, they are
            kept for layers spread evenly over the depth. 0 keeps none.

    Raises:
        SimdiffError: no decoder layers found.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Tensor, *, memory_budget: int = MEMORY_BUDGET
    ) -> None:
        """Prepare; nothing is run yet."""
        self._model = model
        self._windows = windows.split(1)
        self._layers = find_decoder_layers(model).modules
        self._budget = memory_budget
        self._base: frozenset[int] = frozenset()
        self._base_states = False
        # By window, then by layer: the state that enters it and how often it had been written.
        self._states: list[dict[int, tuple[Tensor, int]]] = [{} for _ in self._windows]
        self._output_lengths: dict[int, int | None] = {}
        self._run = _Run(frozenset(), 0, None, None)
        self.layers_run = 0
        """How many layers have been run on one window, for comparison with the plain way."""

    @property
    def num_layers(self) -> int:
        """Of the whole model."""
        return len(self._layers)

    def rebase(self, removed: Collection[int]) -> None:
        """Keep the states of the model without these layers from the next evaluation on."""
        if frozenset(removed) != self._base:
            self._base, self._base_states = frozenset(removed), False

    def losses(self, removed: Collection[int]) -> list[float]:
        """Mean negative log-likelihood of each window without these layers; may be NaN or Inf.

        Raises:
            SimdiffError: not layers of the model, or all of them.
        """
        with self._ready(removed):
            return [
                self._read(window, frozenset(removed), window_loss)
                for window in range(len(self._windows))
            ]

    def token_losses(self, removed: Collection[int], window: int) -> Tensor:
        """Losses of one window without these layers, see `simdiff.evaluation.token_losses`.

        Raises:
            SimdiffError: not layers of the model, or all of them.
        """
        with self._ready(removed):
            return self._read(
                window, frozenset(removed), lambda model, ids: token_losses(model, ids[0])
            )

    @contextlib.contextmanager
    def _ready(self, removed: Collection[int]) -> Iterator[None]:
        check_layers(removed, self.num_layers, "layers to pass by")
        if len(removed) >= self.num_layers:
            raise SimdiffError(
                f"losses: removed must leave a layer, got all {self.num_layers} layers"
            )
        # Not inference mode, where tensors do not count how often they are written.
        with torch.inference_mode(False), torch.no_grad(), self._overridden():
            if not self._base_states:
                self._keep_base_states()
            yield

    def _keep_base_states(self) -> None:
        kept = self._kept_layers()
        if not self._output_lengths:  # what a layer returns is seen when it runs
            self._forward(0, _Run(frozenset(), 0, None, None))
        for window, states in enumerate(self._states):
            states.clear()
            if kept:
                self._forward(window, _Run(self._base, 0, None, (kept, states)))
        self._base_states = True

    def _kept_layers(self) -> frozenset[int]:
        """Layers whose entering states fit into the budget; what enters layer 0 is cheap."""
        embedding = self._model.get_input_embeddings().weight
        tokens = sum(ids.numel() for ids in self._windows)
        width = getattr(self._model.config.get_text_config(decoder=True), "hidden_size", 0)
        fit = self._budget // max(1, tokens * width * embedding.element_size())
        count = min(fit, self.num_layers - 1)
        return frozenset(round((k + 1) * self.num_layers / (count + 1)) for k in range(count)) - {
            0,
            self.num_layers,
        }

    def _read(
        self, window: int, removed: frozenset[int], loss_of: Callable[[PreTrainedModel, Tensor], T]
    ) -> T:
        changed = min(removed ^ self._base, default=self.num_layers)
        states = self._states[window]
        start = max((layer for layer in states if layer <= changed), default=0)
        entering, version = states.get(start, (None, 0))
        self._run = _Run(removed, start, entering, None)
        loss = loss_of(self._model, self._windows[window])
        if entering is not None and entering._version != version:
            raise SimdiffError(
                f"a layer from {start} on writes over what enters it, so that states cannot be "
                "reused: give memory_budget=0"
            )
        return loss

    def _forward(self, window: int, run: _Run) -> None:
        """A forward without the language-model head."""
        self._run = run
        device = self._model.get_input_embeddings().weight.device
        decoder_body(self._model)(input_ids=self._windows[window].to(device), use_cache=False)

    @contextlib.contextmanager
    def _overridden(self) -> Iterator[None]:
        """`forward` of every layer replaced by ours, then put back as it was."""
        before = [layer.__dict__.get("forward") for layer in self._layers]
        try:
            for index, layer in enumerate(self._layers):
                layer.forward = self._wrapped(index, layer.forward)
            yield
        finally:
            for layer, forward in zip(self._layers, before, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward

    def _wrapped(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def bypassing(*args: Any, **kwargs: Any) -> Any:
            run = self._run
            states = args[0] if args else kwargs["hidden_states"]
            if index == run.start and run.entering is not None:
                states = run.entering
                args, kwargs = _replaced(states, args, kwargs)
            if run.keep is not None and index in run.keep[0]:
                run.keep[1][index] = (states, states._version)
            if index < run.start or index in run.removed:
                length = self._output_lengths[index]
                return states if length is None else (states, *[None] * (length - 1))
            output = forward(*args, **kwargs)
            self.layers_run += 1
            self._output_lengths[index] = len(output) if isinstance(output, tuple) else None
            return output

        return bypassing


class _Run:
    """What one forward does: layers passed by, where it starts and with what, what it keeps."""

    def __init__(
        self,
        removed: frozenset[int],
        start: int,
        entering: Tensor | None,
        keep: tuple[frozenset[int], dict[int, tuple[Tensor, int]]] | None,
    ) -> None:
        self.removed, self.start, self.entering, self.keep = removed, start, entering, keep


def _replaced(
    states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (states, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": states}
