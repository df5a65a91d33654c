"""What the modules of a layer do, found by running it on a few tokens."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# A probe shifts the output of a module by the size of the layer's output and checks that the
# layer's output shifts by the same. This tolerance allows for rounding of the residual stream.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def entering(module: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """What enters a module in a run."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, args: found.append(args[0].clone()))
    try:
        run()
    finally:
        handle.remove()
    return found[0]


@dataclass(frozen=True)
class Call:
    """Of a module without children that ran exactly once."""

    place: int
    """In the order of all calls."""
    name: str
    module: nn.Module
    entered: Tensor
    output: Tensor

    @property
    def linear(self) -> bool:
        """Whether the module is a linear map."""
        return isinstance(self.module, (nn.Linear, Conv1D))


@dataclass(frozen=True)
class Trace:
    """The calls of a layer's modules in one run."""

    calls: list[Call]
    norms: dict[int, nn.Module]
    """Modules without children that are not linear, by the id of the tensor that entered them."""
    result: Tensor

    @property
    def linear(self) -> list[Call]:
        """Those of linear maps."""
        return [call for call in self.calls if call.linear]


def traced(layer: nn.Module, run: Callable[[], Tensor]) -> Trace:
    """Run a layer and record what its modules without children read and return."""
    calls: dict[str, list[Call]] = {}
    # The tensors that a call keeps stay alive, so that their ids stay unique.
    count = itertools.count()

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
                call = Call(next(count), name, module, args[0], output)
                calls.setdefault(name, []).append(call)

        return record

    modules = {name: m for name, m in layer.named_modules() if name and not list(m.children())}
    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    every = sorted(itertools.chain(*calls.values()), key=lambda call: call.place)
    entered = {id(call.entered): call.module for call in every}
    norms = {key: m for key, m in entered.items() if not isinstance(m, (nn.Linear, Conv1D))}
    return Trace([call for call in every if len(calls[call.name]) == 1], norms, result)


def arriving_scale(module: nn.Module, run: Callable[[], Tensor], before: Tensor) -> float | None:
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
    # Of a shift that hardly arrives, as behind a softmax, hardly anything is left over either.
    most = max(_TOLERANCE[d] for d in dtypes) * min(1.0, abs(scale))
    return scale if abs(scale) > 1e-6 and rest <= most else None


def gain_of(norm: nn.Module, entering: Tensor) -> Tensor | None:
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
