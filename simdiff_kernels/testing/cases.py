"""The one list of cases, for tests and benchmarks: hidden states from a seed, always the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MASSIVE = 300.0  # times the rest of the row: the activations that METRICS must survive


@dataclass(frozen=True)
class Case:
    """Hidden states before and after a layer, made from a seed, always the same."""

    name: str
    dtype: torch.dtype
    build: Callable[[torch.Generator], tuple[Tensor, Tensor]]

    def states(self) -> tuple[Tensor, Tensor]:
        """The pair of hidden states, of this case's dtype."""
        before, after = self.build(torch.Generator().manual_seed(20260423))
        return before, after

    def __str__(self) -> str:
        """Names the case in test output."""
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


def near(
    shape: tuple[int, ...],
    distance: float,
    *,
    scale: float = 1.0,
    massive: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    """States whose cosine distance is about `distance`, `after` longer by the factor `scale`."""

    def build(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if massive:
            x[..., shape[-1] // 3] *= MASSIVE
        norm, noise_norm = x.norm(dim=-1, keepdim=True), noise.norm(dim=-1, keepdim=True)
        y = scale * (x + noise * (norm / noise_norm) * (2 * distance) ** 0.5)
        return x.to(dtype), y.to(dtype)

    return build


def _strided(kind: str, dtype: torch.dtype) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    def build(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(5, 12, 96, generator=generator).to(dtype)
        y = torch.randn(5, 12, 96, generator=generator).to(dtype)
        if kind == "transposed":
            return x.transpose(0, 1), y.transpose(0, 1)
        if kind == "sliced":  # every second token; rows start unaligned
            return x[:, ::2, 3:74], y[:, 1::2, 3:74]
        if kind == "expanded":
            return x[:1].expand(5, 12, 96), y
        if kind == "strided-hidden":
            return x[..., ::2], y[..., ::2]
        if kind == "four-dimensional":
            return x.view(5, 3, 4, 96).transpose(1, 2), y.view(5, 3, 4, 96).transpose(1, 2)
        return x[0, 0], y[0, 0]  # a single token without leading dimensions

    return build


def _extreme(kind: str, dtype: torch.dtype) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    def build(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(4, 70, generator=generator, dtype=torch.float64)
        y = torch.randn(4, 70, generator=generator, dtype=torch.float64)
        if kind == "identical":
            y = x.clone()
        elif kind == "opposite":
            y = -x
        elif kind == "parallel":
            y = 2 * x
        elif kind == "zero-vectors":  # before, after, both, none
            x[0] = x[2] = y[1] = y[2] = 0
        elif kind == "large":  # float16 ends at 65504, the others' squares would overflow float32
            factor = 1e4 if dtype == torch.float16 else 1e30
            x, y = x * factor, y * factor
        elif kind == "small":  # subnormal in float16
            factor = 1e-6 if dtype == torch.float16 else 1e-30
            x, y = x * factor, y * factor
        return x.to(dtype), y.to(dtype)

    return build


def cases(dtypes: tuple[torch.dtype, ...] | None = None) -> list[Case]:
    """Every case that every backend must get right."""
    all_dtypes = dtypes or (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    found = []
    for dtype in all_dtypes:
        for shape in ((1, 1), (3, 1), (2, 3, 7), (1, 33), (2, 2, 576), (3, 1000), (2, 4097)):
            name = "random-" + "x".join(map(str, shape))
            found.append(Case(name, dtype, near(shape, 0.05, dtype=dtype)))
        for kind in (
            "transposed",
            "sliced",
            "expanded",
            "strided-hidden",
            "four-dimensional",
            "single",
        ):
            found.append(Case(kind, dtype, _strided(kind, dtype)))
        for kind in ("identical", "opposite", "parallel", "zero-vectors", "large", "small"):
            found.append(Case(kind, dtype, _extreme(kind, dtype)))
        for exponent in range(0, 8):
            for massive in (False, True):
                name = f"distance-1e-{exponent}{'-massive' if massive else ''}"
                build = near((6, 576), 10.0**-exponent, massive=massive, dtype=dtype)
                found.append(Case(name, dtype, build))
        build = near((4, 576), 1e-7, scale=1.5, massive=True, dtype=dtype)
        found.append(Case("distance-1e-7-longer", dtype, build))
    return found


@dataclass(frozen=True)
class BlockCase:
    """Hidden states between the layers of a model, made from a seed, always the same."""

    name: str
    dtype: torch.dtype
    build: Callable[[torch.Generator], list[Tensor]]

    def states(self) -> list[Tensor]:
        """h_0 ... h_L, of this case's dtype."""
        return [h.to(self.dtype) for h in self.build(torch.Generator().manual_seed(20260423))]

    def __str__(self) -> str:
        """Names the case in test output."""
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


def walk(
    num_layers: int, shape: tuple[int, ...], step: float, *, growth: float = 1.0
) -> Callable[[torch.Generator], list[Tensor]]:
    """States that each layer turns by about `step` of their length and lengthens by `growth`."""

    def build(generator: torch.Generator) -> list[Tensor]:
        states = [torch.randn(shape, generator=generator, dtype=torch.float64)]
        for _ in range(num_layers):
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            scale = step * states[-1].norm(dim=-1, keepdim=True) / shape[-1] ** 0.5
            states.append(growth * (states[-1] + scale * noise))
        return states

    return build


def _unusual(kind: str, dtype: torch.dtype) -> Callable[[torch.Generator], list[Tensor]]:
    def build(generator: torch.Generator) -> list[Tensor]:
        states = walk(6, (4, 70), 0.2)(generator)
        if kind == "massive-written-and-erased":  # by layer 1 and by layer 4
            for h in states[2:5]:
                h[:, 23] += MASSIVE * h.norm(dim=-1)
        elif kind == "identical":
            states[3] = states[2].clone()
            states[6] = states[0].clone()
        elif kind == "opposite-and-parallel":
            states[2], states[5] = -states[1], 2 * states[4]
        elif kind == "zero-vectors":  # first, in the middle, all
            states[0][0] = states[3][1] = 0
            for h in states:
                h[2] = 0
        elif kind == "short-first":  # embeddings are far shorter than what the layers add
            states[0] = states[0] / 500
        elif kind in ("large", "small"):
            exponent = 4 if kind == "large" else -6
            exponent *= 1 if dtype == torch.float16 else 7 if kind == "large" else 5
            states = [h * 10.0**exponent for h in states]
        return states

    return build


def _strided_blocks(generator: torch.Generator) -> list[Tensor]:
    """Every state with strides of its own, rows unaligned; same shape `(4, 5, 67)`."""
    x = [torch.randn(9, 11, 96, generator=generator) for _ in range(5)]
    return [
        x[0][:4, :5, 3:70],
        x[1].transpose(0, 1)[:4, :5, 29:],
        x[2][1::2, 1::2, :67],
        x[3][:1, :5, 9:76].expand(4, 5, 67),
        x[4].flatten(1)[:4, : 5 * 134 : 2].view(4, 5, 67),
    ]


def block_cases(dtypes: tuple[torch.dtype, ...] | None = None) -> list[BlockCase]:
    """Every case that every backend must get right for blocks of layers."""
    found = []
    for dtype in dtypes or (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for num_layers, shape in (
            (1, (1, 1)),
            (2, (3, 1)),
            (3, (2, 2, 7)),
            (4, (1, 33)),
            (5, (3, 576)),
            (6, (2, 1000)),
            (7, (1, 4097)),
            (8, (2, 31)),
            (12, (2, 64)),
            (30, (1, 40)),
        ):
            name = f"random-{num_layers}-{'x'.join(map(str, shape))}"
            found.append(BlockCase(name, dtype, walk(num_layers, shape, 0.3)))
        for exponent in (2, 4, 6, 7):  # cosine distances of neighbours near half of 10^-exponent
            build = walk(4, (3, 576), 10.0 ** (-exponent / 2))
            found.append(BlockCase(f"distance-1e-{exponent}", dtype, build))
            build = walk(4, (3, 576), 10.0 ** (-exponent / 2), growth=1.5)
            found.append(BlockCase(f"distance-1e-{exponent}-longer", dtype, build))
        for kind in (
            "massive-written-and-erased",
            "identical",
            "opposite-and-parallel",
            "zero-vectors",
            "short-first",
            "large",
            "small",
        ):
            found.append(BlockCase(kind, dtype, _unusual(kind, dtype)))
        found.append(BlockCase("strided", dtype, _strided_blocks))
        found.append(BlockCase("single", dtype, lambda g: [h[0] for h in walk(3, (1, 50), 0.3)(g)]))
    return found


def with_strides(tensor: Tensor, device: str) -> Tensor:
    """The tensor on a device, strided and aligned as it is: `Tensor.to` would make it dense."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return whole.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
