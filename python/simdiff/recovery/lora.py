"""Low-rank adapters (LoRA) on the layers that remain, through `peft`, merged afterwards.

A linear map W x becomes W x + (alpha / rank) B A x with A of `rank` rows and B of `rank` columns,
of which only A and B learn (Hu et al. 2021, arXiv 2106.09685). Merged, W + (alpha / rank) B A is an
ordinary weight again, and the checkpoint is one that stock classes load.
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
from simdiff.models import find_decoder_layers


@dataclass(frozen=True)
class LoraOptions:
    """Size and place of the adapters."""

    rank: int = 32
    alpha: float = 64.0
    """The adapters' output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's input that is dropped in training."""
    targets: tuple[str, ...] = ()
    """Last names of the projections, such as q_proj; none means all linear ones of the layers."""

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            SimdiffError: a rank below 1, an alpha of 0 or less, a dropout outside [0, 1).
        """
        if self.rank < 1:
            raise SimdiffError(f"lora: rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise SimdiffError(f"lora: alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise SimdiffError(f"lora: dropout must be at least 0 and below 1, got {self.dropout}")


def require_peft() -> Any:
    """The package `peft`.

    Raises:
        SimdiffError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise SimdiffError(
            f"fine-tuning needs the package peft ({error}): pip install 'simdiff-kernels[recover]'"
        ) from None
    return peft


class Adapters:
    """Adapters in a model, from when they are put in until they are merged or taken out.

    The model is changed in place: its own parameters are frozen, and the chosen projections carry
    adapters, A drawn from torch's global generator, B zero: the model computes what it did.

    Raises:
        SimdiffError: no `peft`; quantised weights, which cannot take up a change; no such target.
    """

    def __init__(
        self, model: PreTrainedModel, options: LoraOptions, *, cast_inputs: bool = True
    ) -> None:
        """Put adapters in; `cast_inputs=False` leaves the dtypes of their products to autocast."""
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
            r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, bias="none",
            target_modules=list(self.targets), task_type="CAUSAL_LM",
            fan_in_fan_out=any(isinstance(model.get_submodule(t), Conv1D) for t in self.targets),
        )  # fmt: skip
        with warnings.catch_warnings():
            # It asks transformers for a name of its own that is going to be replaced.
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            self._wrapper = peft.get_peft_model(model, config)
        self.model = model
        for layer in self._layers():
            layer.cast_input_dtype_enabled = cast_inputs

    def parameters(self) -> dict[str, nn.Parameter]:
        """A and B of every adapter by name, float32."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """A copy of the adapters, on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the adapters to a copy that `state` made."""
        for name, parameter in self.parameters().items():
            parameter.copy_(state[name])

    def merge(self) -> PreTrainedModel:
        """Add every adapter to its weight, in float32, and take it out; the dtype is as it was.

        Raises:
            ValueError: a merged weight would hold NaN or Inf.
        """
        for module in self._layers():
            base = module.get_base_layer()
            weight = base.weight.detach()
            # float32: else peft rounds the change before it is added. New parameters: a dense model
            # may share the old ones.
            base.weight = nn.Parameter(weight.float(), requires_grad=False)
            module.merge(safe_merge=True)
            base.weight = nn.Parameter(base.weight.detach().to(weight.dtype), requires_grad=False)
        return self.remove()

    def remove(self) -> PreTrainedModel:
        """Take the adapters out; what was not merged is gone."""
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
    """Full names of the linear projections in the decoder layers, or of those named last so.

    Raises:
        SimdiffError: there are none; the message lists those that there are.
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
