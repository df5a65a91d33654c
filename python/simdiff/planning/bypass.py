"""Compute the losses of a model without some layers by skipping them in the forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.evaluation.losses import token_losses, window_loss
from simdiff.io import ranks
from simdiff.models.layer_indices import check_layers
from simdiff.models.partial_forward import Course, PartialForward
from simdiff.models.windows import check_windows

# Bytes of hidden states kept for reuse; 8 windows of 512 tokens of a 7B model in bf16 fill it.
MEMORY_BUDGET = 1 << 30

T = TypeVar("T")


class BypassEvaluator:
    """Evaluates a model without any given set of layers and reuses states that do not change.

    A skipped layer returns its input; the model, its masks and its positions stay as they are, so
    nothing is rebuilt. The states that enter the layers are kept for one set of removed layers, the
    base. Any other set runs only the layers from the first one on which both differ. The result is
    bitwise that of a forward from the start.

    Args:
        model: causal language model.
        windows: token ids `(num_windows, window_length)`.
        memory_budget: bytes for the kept states; if those of all layers do not fit, the states are
            kept for layers spread evenly over the depth. 0 keeps none.

    Raises:
        SimdiffError: no decoder layers are found, or the model cannot read the windows.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Tensor, *, memory_budget: int = MEMORY_BUDGET
    ) -> None:
        """Prepare; nothing is run yet."""
        check_windows(model, [windows], "perplexity")
        self._model = model
        self._windows = windows.split(1)
        self._partial = PartialForward(model)
        self._budget = memory_budget
        self._base: frozenset[int] = frozenset()
        self._with_states = set[int]()  # windows that were run without the base's layers
        # For each window and layer, the state that enters the layer and the tensor's version, which
        # counts in-place writes.
        self._states: list[dict[int, tuple[Tensor, int]]] = [{} for _ in self._windows]

    @property
    def layers_run(self) -> int:
        """Number of layers run so far on one window, for comparison with plain forwards."""
        return self._partial.layers_run

    @property
    def num_layers(self) -> int:
        """Number of layers of the whole model."""
        return len(self._partial.layers)

    def rebase(self, removed: Collection[int]) -> None:
        """Make the model without these layers the base, from the next evaluation on."""
        if frozenset(removed) != self._base:
            self._base = frozenset(removed)
            self._with_states.clear()
            for states in self._states:
                states.clear()  # they must not lie beside those of the new base

    def losses(self, removed: Collection[int]) -> list[float]:
        """Mean negative log-likelihood of each window without these layers; may be NaN or Inf.

        Raises:
            SimdiffError: `removed` are not layers of the model, or are all layers.
        """
        with self._ready(removed):
            return ranks.shared(
                lambda window: self._read(window, frozenset(removed), window_loss),
                range(len(self._windows)),
            )

    def token_losses(self, removed: Collection[int], window: int) -> Tensor:
        """Losses of one window without these layers, see `simdiff.evaluation.losses.token_losses`.

        Raises:
            SimdiffError: `removed` are not layers of the model, or are all layers.
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
        # no_grad, not inference mode: there tensors do not count in-place writes.
        with torch.inference_mode(False), torch.no_grad(), self._partial:
            yield

    def _base_states(self, window: int) -> dict[int, tuple[Tensor, int]]:
        """The states of a window that are kept; the first time, its layers run without the base."""
        states, kept = self._states[window], self._kept_layers()
        if kept and window not in self._with_states:
            states.update(self._partial.entering(self._windows[window], kept, self._base))
        self._with_states.add(window)
        return states

    def _kept_layers(self) -> frozenset[int]:
        """Layers whose entering states are kept: evenly spaced, within the budget, not layer 0."""
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
        states = self._base_states(window)
        start = max((layer for layer in states if layer <= changed), default=0)
        entering, version = states.get(start, (None, 0))
        with self._partial.following(Course(start, entering, passed_by=removed)):
            loss = loss_of(self._model, self._windows[window])
        check_unwritten(start, entering, version)
        return loss


def check_unwritten(start: int, entering: Tensor | None, version: int) -> None:
    """Refuse to go on where a layer from `start` on wrote over a kept state.

    Raises:
        SimdiffError: the state has been written to since its version was read.
    """
    if entering is not None and entering._version != version:
        raise SimdiffError(
            f"a layer from {start} on writes over what enters it, so that states cannot be "
            "reused: give memory_budget=0"
        )
