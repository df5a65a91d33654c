"""Low-rank adapters (LoRA) on the kept layers, through `peft`, and their merging.

A linear map W x becomes W x + (alpha / rank) B A x, where A has `rank` rows, B has `rank` columns
and only A and B are trained (Hu et al. 2021, arXiv 2106.09685). After merging, W + (alpha / rank)
B A is an ordinary weight, and stock classes load the checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from simdiff.errors import SimdiffError
from simdiff.models.structure import find_decoder_layers


@dataclass(frozen=True)
class LoraOptions:
    """Rank, scale, dropout and places of the adapters."""

    rank: int = 32
    alpha: float = 64.0
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Probability with which an entry of an adapter's input is dropped in training."""
    targets: tuple[str, ...] = ()
    """Last parts of the projections' names, such as q_proj; empty takes all linear modules of the
    layers."""

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            SimdiffError: rank is below 1, alpha is not positive, or dropout is outside [0, 1).
        """
        if self.rank < 1:
            raise SimdiffError(f"lora: rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise SimdiffError(f"lora: alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise SimdiffError(f"lora: dropout must be at least 0 and below 1, got {self.dropout}")


def require_peft() -> Any:
    """Import the package `peft`.

    Raises:
        SimdiffError: `peft` is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise SimdiffError(
            f"fine-tuning needs the package peft ({error}): pip install 'simdiff-kernels[recover]'"
        ) from None
    return peft


class Adapters:
    """The adapters of a model, until they are merged or removed.

    The model is changed in place: its own parameters are frozen, and the chosen projections get
    adapters. A is drawn from torch's global generator and B is zero, so the model's output does not
    change at first.

    Raises:
        SimdiffError: `peft` is missing, the weights are quantised and cannot be changed, or a
            target does not exist.
    """

    def __init__(
        self, model: PreTrainedModel, options: LoraOptions, *, cast_inputs: bool = True
    ) -> None:
        """Insert adapters; `cast_inputs=False` leaves the dtypes of their products to autocast."""
        options.check()
        peft = require_peft()
        if getattr(model, "is_quantized", False):
            raise SimdiffError(
                "fine-tuning needs weights that adapters can be merged into, got quantised ones: "
                "recover the unquantised model and quantise the result"
            )
        self.targets = target_modules(model, options.targets)
        self._trained_before = {n: p.requires_grad for n, p in model.named_parameters()}
        config = peft.LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            bias="none",
            target_modules=list(self.targets),
            task_type="CAUSAL_LM",
            fan_in_fan_out=any(isinstance(model.get_submodule(t), Conv1D) for t in self.targets),
        )
        with warnings.catch_warnings():
            # peft uses names of transformers that are deprecated.
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            self._wrapper = peft.get_peft_model(model, config)
        self.model = model
        for layer in self._layers():
            layer.cast_input_dtype_enabled = cast_inputs

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters A and B of every adapter by name, float32."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """A copy of the adapters' parameters on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the adapters to a copy made by `state`."""
        for name, parameter in self.parameters().items():
            parameter.copy_(state[name])

    def merge(self) -> PreTrainedModel:
        """Add every adapter to its weight in float32 and remove it; weights keep their dtype.

        Raises:
            ValueError: a merged weight would contain NaN or Inf.
        """
        for module in self._layers():
            base = module.get_base_layer()
            weight = base.weight.detach()
            # In float32, since peft would round the change before adding it. The parameters are new
            # ones, since a dense model may share the old ones.
            base.weight = nn.Parameter(weight.float(), requires_grad=False)
            module.merge(safe_merge=True)
            base.weight = nn.Parameter(base.weight.detach().to(weight.dtype), requires_grad=False)
        return self.remove()

    def remove(self) -> PreTrainedModel:
        """Remove the adapters without merging them."""
        self._wrapper.unload()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trained_before[name])
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            vars(self.model).pop(attribute, None)
        return self.model

    def _layers(self) -> list[Any]:
        from peft.tuners.lora import LoraLayer

        return [module for module in self.model.modules() if isinstance(module, LoraLayer)]


def target_modules(model: PreTrainedModel, targets: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Full names of the linear modules in the decoder layers, or of those whose last part matches.

    Raises:
        SimdiffError: there are none; the message lists the modules that exist.
    """
    found = find_decoder_layers(model)
    linear = [
        f"{found.path}.{name}"
        for name, module in found.modules.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    unknown = [target for target in targets if target not in names]
    if unknown or not linear:
        raise SimdiffError(
            f"lora: targets must be linear projections of the decoder layers, "
            f"{', '.join(names) or 'of which there are none'}, got {', '.join(unknown) or 'none'}"
        )
    return tuple(name for name in linear if not targets or name.rpartition(".")[2] in targets)
