"""Train the last layers, the final norm and the head directly, without adapters.

Whatever the forward uses from a layer on is trained, in float32: the layers themselves, the norm
behind them and the head. What lies before that layer never changes, so the states that enter it are
computed once for each example. A weight that stands in several places stays as it is: a head that
is the input embedding too. ("Reassessing Layer Pruning in LLMs", openreview 04Tfwy3LLC, trains the
last three layers and the head.)
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models.partial_forward import Course, PartialForward
from simdiff.models.running import evaluating
from simdiff.models.structure import find_decoder_layers
from simdiff.surgery.copies import replace_parameter

LEAST = 3
"""Layers that are trained where fewer lie at the cut and behind it."""


class LastLayers:
    """The trained parameters of a model's last layers, until they are merged or removed.

    The model is changed in place: these parameters are new ones, all others are frozen.

    Args:
        model: the model.
        count: how many of its last layers are trained.
        dtype: of the products.

    Raises:
        SimdiffError: the model has fewer layers, or quantised weights.
    """

    def __init__(self, model: PreTrainedModel, count: int, dtype: torch.dtype) -> None:
        """Put the trained parameters in their places."""
        if getattr(model, "is_quantized", False):
            raise SimdiffError(
                "fine-tuning needs weights that can be trained, got quantised ones: recover the "
                "unquantised model and quantise the result"
            )
        num_layers = len(find_decoder_layers(model))
        if not 1 <= count <= num_layers:
            raise SimdiffError(
                f"fine-tuning: last_layers must be 1 to {num_layers}, of which the pruned model "
                f"is made, got {count}"
            )
        self.first = num_layers - count
        """The first layer that is trained."""
        self.model = model
        self._trained_before = {n: p.requires_grad for n, p in model.named_parameters()}
        self._partial = PartialForward(model, autocast=dtype != torch.float32)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._partial)
            self._places = _places(model, self._partial, self.first)
            self._ending = stack.pop_all()
        self._before = {
            name: module._parameters[key] for name, (module, key) in self._places.items()
        }
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name, (module, key) in self._places.items():
            module._parameters[key] = nn.Parameter(self._parameter(name).detach().float().clone())

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the trained parameters."""
        return tuple(self._places)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, float32."""
        return {name: self._parameter(name) for name in self._places}

    def state(self) -> dict[str, Tensor]:
        """A copy of the trained parameters on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the trained parameters to a copy made by `state`."""
        for name, parameter in self.parameters().items():
            parameter.copy_(state[name])

    def entering(self, tokens: Tensor, stop: int) -> Tensor:
        """The states `(batch, sequence, hidden_size)` that enter layer `stop`."""
        return self._run(tokens, None, 0, stop)

    def entering_first(
        self, tokens: Tensor, states: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Those that enter the first trained layer, also from those that enter layer `start`."""
        return self._run(tokens, states, start, self.first)

    def _run(self, tokens: Tensor, states: Tensor | None, start: int, stop: int) -> Tensor:
        with evaluating(self.model):
            return self._partial.run({"input_ids": tokens}, states, start, stop)

    def starting_from(self, states: Tensor) -> contextlib.AbstractContextManager[None]:
        """Forwards and backwards inside the with block begin at the first trained layer."""
        return self._partial.following(Course(self.first, states))

    def merge(self) -> PreTrainedModel:
        """Leave the trained parameters in the model, in the dtype of those before them."""
        found = {name: p.detach() for name, p in self.parameters().items()}
        self.remove()
        for name, (module, key) in self._places.items():
            replace_parameter(module, key, found[name])
        return self.model

    def remove(self) -> PreTrainedModel:
        """Put the parameters from before the training back."""
        self._ending.close()
        for name, (module, key) in self._places.items():
            module._parameters[key] = self._before[name]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trained_before[name])
        return self.model

    def _parameter(self, name: str) -> nn.Parameter:
        module, key = self._places[name]
        parameter = module._parameters[key]
        assert parameter is not None
        return parameter


def _places(
    model: PreTrainedModel, partial: PartialForward, first: int
) -> dict[str, tuple[nn.Module, str]]:
    """Where the parameters stand that the forward uses from layer `first` on, by their names."""
    found = find_decoder_layers(model)
    late = tuple(f"{found.path}.{index}." for index in range(first, len(found)))
    behind = _behind(model, partial)
    places = {
        f"{path}.{key}" if path else key: (module, key, parameter)
        for path, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
    }
    uses = Counter(id(parameter) for _, _, parameter in places.values())
    return {
        name: (module, key)
        for name, (module, key, parameter) in places.items()
        if (name.startswith(late) or name in behind)
        and uses[id(parameter)] == 1
        and parameter.is_floating_point()
    }


def _behind(model: PreTrainedModel, partial: PartialForward) -> set[str]:
    """Names of the parameters behind all layers: the logits have a slope in them from there on."""
    path = find_decoder_layers(model).path
    named = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith(f"{path}.") and parameter.is_floating_point()
    }
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    with evaluating(model), torch.enable_grad():
        states = partial.run({"input_ids": ids}, None, 0, len(partial.layers))
        before = [parameter.requires_grad for parameter in named.values()]
        try:
            for parameter in named.values():
                parameter.requires_grad_(True)
            with partial.following(Course(len(partial.layers), states)):
                logits = model(input_ids=ids, use_cache=False).logits
            slopes = torch.autograd.grad(
                logits.float().sum(), list(named.values()), allow_unused=True
            )
        finally:
            for parameter, trained in zip(named.values(), before, strict=True):
                parameter.requires_grad_(trained)
    return {name for name, slope in zip(named, slopes, strict=True) if slope is not None}
