"""Hidden states carried from depth to depth: layers of a model, run on states given to them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models import decoder_body, find_decoder_layers


class Depths:
    """Runs layers `start` to `stop - 1` of a model on the states that enter layer `start`.

    Masks, positions and whatever else the model hands to its layers are made by the model itself
    from the batch; layers before `start` pass their input on, and the forward ends with layer
    `stop - 1`. The states of one depth are thus all that must be kept of a text.

    Args:
        model: causal language model.
        autocast: compute products of a float32 model in bfloat16; states stay float32.

    Usage::

        with Depths(model) as depths:
            states = depths.embed(batch)
            states = depths.run(batch, states, 0, 4)
    """

    def __init__(self, model: PreTrainedModel, *, autocast: bool = False) -> None:
        """Prepare; the model is changed only while entered."""
        self.model = model
        self.layers: nn.ModuleList = find_decoder_layers(model).modules
        self._body = decoder_body(model)
        self._autocast = autocast
        self._before: list[Any] = []
        self._lengths: dict[int, int | None] = {}
        """Of the tuples that layers return; None for a tensor."""
        self._start = self._stop = 0
        self._states: Tensor | None = None
        self._result: Tensor | None = None

    def __enter__(self) -> Depths:
        """Replace the layers' `forward`."""
        self._before = [layer.__dict__.get("forward") for layer in self.layers]
        for index, layer in enumerate(self.layers):
            layer.forward = self._wrapped(index, layer.forward)
        try:  # what a layer returns is seen when it runs
            ids = torch.zeros(1, 2, dtype=torch.int64)
            with torch.no_grad():
                self._forward({"input_ids": ids}, None, 0, len(self.layers))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Put every `forward` back as it was."""
        for layer, forward in zip(self.layers, self._before, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward

    def embed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The states that enter layer 0 for a batch of `model_inputs`."""
        return self.run(batch, None, 0, 0)

    @torch.no_grad()
    def run(
        self, batch: Mapping[str, Tensor], states: Tensor | None, start: int, stop: int
    ) -> Tensor:
        """The states `(batch, sequence, hidden_size)` that leave layer `stop - 1`.

        Args:
            batch: of `model_inputs`; the tokens whose states these are.
            states: what enters layer `start`; None is what the model itself hands to layer 0.
            start, stop: the layers, 0 <= start <= stop.

        Raises:
            SimdiffError: a layer hands on something else than one tensor of that shape, or NaN.
        """
        if start == stop and states is not None:
            return states
        result = self._forward(batch, states, start, stop)
        shape = tuple(batch["input_ids"].shape)
        if result is None or result.dim() != 3 or tuple(result.shape[:2]) != shape:
            found = "none" if result is None else tuple(result.shape)
            raise SimdiffError(
                f"recovery needs hidden states {(*shape, 'hidden_size')} between the layers of "
                f"{type(self.model).__name__}, got {found}"
            )
        if not bool(torch.isfinite(result).all()):
            raise SimdiffError(
                f"recovery: hidden states must be finite, got NaN or Inf among those that enter "
                f"layer {stop} of {len(self.layers)}"
            )
        return result

    def _forward(
        self, batch: Mapping[str, Tensor], states: Tensor | None, start: int, stop: int
    ) -> Tensor | None:
        self._start, self._stop, self._states, self._result = start, stop, states, None
        device = self.model.get_input_embeddings().weight.device
        keywords = {name: value.to(device) for name, value in batch.items()}
        with contextlib.suppress(_Reached), self._precision(device):
            self._body(**keywords, use_cache=False)
        result, self._states, self._result = self._result, None, None
        return result

    def _precision(self, device: torch.device) -> Any:
        if not self._autocast:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def _wrapped(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*args: Any, **kwargs: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            if index == self._start and self._states is not None:
                states = self._states
                if args:
                    args = (states, *args[1:])
                else:
                    kwargs = {**kwargs, "hidden_states": states}
            if self._stop <= index:
                self._result = states
                raise _Reached
            if index < self._start:
                length = self._lengths[index]
                return states if length is None else (states, *[None] * (length - 1))
            output = forward(*args, **kwargs)
            self._lengths[index] = len(output) if isinstance(output, (tuple, list)) else None
            if index == self._stop - 1:
                self._result = output[0] if isinstance(output, (tuple, list)) else output
                raise _Reached
            return output

        return stepping


class _Reached(Exception):  # noqa: N818 - the layer at which a forward ends
    pass


def model_inputs(batches: Sequence[Tensor | Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Batches as the model takes them, padding told by `attention_mask` and positions after it.

    Raises:
        SimdiffError: not token ids `(batch, sequence)`, or a mask of another shape.
    """
    result = []
    for batch in batches:
        ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
        mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
        if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
            raise SimdiffError(
                f"recovery: input_ids must be integers (batch, sequence), got {ids.dtype} of "
                f"shape {tuple(ids.shape)}"
            )
        inputs = {"input_ids": ids}
        if mask is not None and mask.shape != ids.shape:
            raise SimdiffError(
                f"recovery: attention_mask must have shape {tuple(ids.shape)} like input_ids, got "
                f"{tuple(mask.shape)}"
            )
        if mask is not None and not bool(mask.all()):
            inputs["attention_mask"] = mask.long()
            if not bool(mask[:, 0].all()):  # padded on the left: positions start at the text
                inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
        result.append(inputs)
    return result


def token_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """Which tokens of a batch count, `(batch * sequence,)`, bool."""
    mask = batch.get("attention_mask")
    ids = batch["input_ids"]
    return (torch.ones_like(ids) if mask is None else mask).flatten().bool()


@contextlib.contextmanager
def depths(
    model: PreTrainedModel, pruned: PreTrainedModel, *, autocast: bool
) -> Iterator[tuple[Depths, Depths]]:
    """Both models, entered."""
    with (
        Depths(model, autocast=autocast) as dense,
        Depths(pruned, autocast=autocast) as student,
    ):
        yield dense, student
