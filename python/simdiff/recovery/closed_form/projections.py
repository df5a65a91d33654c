"""Find the linear map through which a decoder layer writes to the residual stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from simdiff.surgery.copies import replace_parameter

# A probe shifts the output of a module by the size of the layer's output and checks that the
# layer's output shifts by the same. This tolerance allows for rounding of the residual stream.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class OutputProjection:
    """A linear module whose output, times a factor or after an RMS norm, is added to the stream.

    With the module's input z, its output o = W z (+ b) and all other terms m of the layer's output:

        layer output = m + scale · o                     without a norm
        layer output = m + scale · gain ⊙ o / rms(o)     with one
    """

    name: str
    """Name of the module within the layer."""
    module: nn.Module
    scale: float
    norm: nn.Module | None
    gain: Tensor | None
    """Gain of the norm, `(hidden_size,)`; None without a norm."""

    @property
    def in_features(self) -> int:
        """Number of the module's inputs, the entries of z."""
        return int(_weight(self.module).shape[1])

    @property
    def has_bias(self) -> bool:
        """Whether the module adds a bias."""
        return getattr(self.module, "bias", None) is not None

    def from_outputs(self, correction: Tensor) -> Tensor:
        """Convert a correction in o to one in z: o + Vᵀo (+ v) has the weight W + VᵀW.

        Args:
            correction: V, `(hidden_size, hidden_size)`, with v as an additional last row if the
                module has a bias.

        Returns:
            The correction for `correct`, `(in_features, hidden_size)`, with a last row for a bias.
        """
        weight = _weight(self.module).detach().to(correction)
        square = correction[: weight.shape[0]]
        result = weight.T @ square
        if not self.has_bias:
            return result
        bias = self.module.bias
        assert isinstance(bias, Tensor)
        shift = bias.detach().to(correction) @ square + correction[-1]
        return torch.cat([result, shift[None]])

    def correct(self, correction: Tensor) -> None:
        """Add Vᵀ to the weight, and the last row of V to the bias if the module has one.

        Args:
            correction: V, `(in_features, hidden_size)`, with one more row for a bias.
        """
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        change = correction[: self.in_features].to(weight.device)
        if not isinstance(self.module, Conv1D):
            change = change.T
        replace_parameter(self.module, "weight", weight.detach().double() + change)
        if self.has_bias:
            bias = self.module.bias
            assert isinstance(bias, Tensor)
            replace_parameter(
                self.module, "bias", bias.detach().double() + correction[-1].to(bias.device)
            )

    def added(self, old: Mapping[str, Any], entered: Tensor) -> Tensor:
        """What a correction adds to the layer's output: scale · (ΔW z + Δb), without a norm.

        Args:
            old: the module's parameters before it was corrected.
            entered: z, `(..., in_features)`.

        Returns:
            `(..., hidden_size)`, float32, or float64 for float64.
        """
        dtype = torch.float64 if entered.dtype == torch.float64 else torch.float32
        changes = {
            name: parameter.detach().to(dtype) - old[name].detach().to(dtype)
            for name, parameter in self.module._parameters.items()
            if parameter is not None
        }
        weight = changes["weight"]
        result = entered.to(weight) @ (weight if isinstance(self.module, Conv1D) else weight.T)
        if self.has_bias:
            result += changes["bias"]
        return self.scale * result


def _weight(module: nn.Module) -> Tensor:
    """The weight of a linear module, `(out_features, in_features)`, also of GPT-2's Conv1D."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


@torch.no_grad()
def find_projection(
    layer: nn.Module, run: Callable[[], Tensor], hidden_size: int
) -> OutputProjection | None:
    """Find the widest linear module of a layer that writes to the residual stream and nowhere else.

    It is found by its effect, not by its name: if its output is shifted, the layer's output must
    shift by the same, times a factor or through an RMS norm. This holds for the down projection of
    the MLP. It holds for the output projection of attention only in parallel layers, since else an
    MLP reads it.

    Args:
        layer: a decoder layer of a model.
        run: runs the layer on some tokens and returns the states that leave it.
        hidden_size: size of the residual stream.

    Returns:
        The module, or None if there is none, as in layers that end with a mixture of experts.
    """
    trace = _trace(layer, run)
    found = []
    for name, module, output in trace.linear:
        if output.shape[-1] != hidden_size or output.numel() != trace.result.numel():
            continue
        norm = trace.norms.get(id(output))
        for candidate in (None, norm) if norm is not None else (None,):
            probed = candidate if candidate is not None else module
            scale = _probe(probed, run, trace.result)
            gain = None if candidate is None else _gain(candidate, output)
            if scale is not None and (candidate is None or gain is not None):
                found.append(OutputProjection(name, module, scale, candidate, gain))
                break
    return max(found, key=lambda projection: projection.in_features, default=None)


@dataclass
class _Trace:
    linear: list[tuple[str, nn.Module, Tensor]]
    """Linear modules that ran exactly once: name, module, output."""
    norms: dict[int, nn.Module]
    """Modules without children, by the id of the tensor that entered them."""
    result: Tensor


def _trace(layer: nn.Module, run: Callable[[], Tensor]) -> _Trace:
    calls: dict[str, list[Tensor]] = {}
    entered: dict[int, nn.Module] = {}
    kept: list[Tensor] = []  # keeps tensors alive, so that their ids stay unique

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
                calls.setdefault(name, []).append(output)
                entered[id(args[0])] = module
                kept.append(args[0])

        return record

    modules = {name: m for name, m in layer.named_modules() if name and not list(m.children())}
    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    linear = [
        (name, modules[name], outputs[0])
        for name, outputs in calls.items()
        if isinstance(modules[name], (nn.Linear, Conv1D)) and len(outputs) == 1
    ]
    norms = {key: m for key, m in entered.items() if not isinstance(m, (nn.Linear, Conv1D))}
    return _Trace(linear, norms, result)


def _probe(module: nn.Module, run: Callable[[], Tensor], before: Tensor) -> float | None:
    """The factor by which a shift of a module's output shifts the layer's; None if it is no
    multiple."""
    generator = torch.Generator().manual_seed(0)
    size = before.float().square().mean().sqrt()
    noise = torch.randn(before.shape, generator=generator).to(before.device) * size
    shifts: list[Tensor] = []
    dtypes = [before.dtype]

    def shifted(output: Tensor) -> Tensor:
        result = (output + noise.view(output.shape)).to(output.dtype)
        shifts.append((result.double() - output.double()).view(before.shape))
        dtypes.append(output.dtype)
        return result

    with _hooked(module, shifted):
        arrived = run().double() - before.double()
    (wanted,) = shifts
    scale = float((arrived * wanted).sum() / wanted.square().sum())
    rest = float((arrived - scale * wanted).norm() / wanted.norm())
    return scale if abs(scale) > 1e-6 and rest <= max(_TOLERANCE[d] for d in dtypes) else None


def _gain(norm: nn.Module, entering: Tensor) -> Tensor | None:
    """The gain of a module that is an RMS norm; None for any other module."""
    device = entering.device
    gain = norm(torch.ones(1, entering.shape[-1], dtype=torch.float32, device=device))
    if not isinstance(gain, Tensor) or gain.shape[-1] != entering.shape[-1]:
        return None
    gain = gain.detach().double().flatten()
    x = entering.detach().float().reshape(-1, entering.shape[-1])
    wanted = gain * (x.double() / rms(x.double()))
    rest = float((norm(x).double() - wanted).norm() / wanted.norm())
    return gain if rest <= 3e-2 else None


def rms(states: Tensor) -> Tensor:
    """Root mean square over the last dimension, which is kept with size 1."""
    return states.square().mean(-1, keepdim=True).sqrt()


@contextlib.contextmanager
def _hooked(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda m, args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def recorded_calls(projection: OutputProjection) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record the calls of a projection inside a with block.

    The list that is yielded holds the input and the output of the last call, as its only entry.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # Cloned because Falcon adds the attention's output to it in place.
        seen[:] = [(args[0], output.clone())]

    handle = projection.module.register_forward_hook(record)
    try:
        yield seen
    finally:
        handle.remove()
