"""One list of cases for tests and benchmarks, the exact result, and what counts as accurate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simdiff_kernels.metrics import METRICS, TokenMetrics

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


def exact_metrics(before: Tensor, after: Tensor) -> TokenMetrics:
    """The metrics of exactly these values in extended precision, by an independent computation.

    NumPy's longdouble has 64 bits of mantissa on x86; the cosine distance comes from the part of
    y that is orthogonal to x, not from norms as in the backends.
    """
    import numpy as np

    x = before.double().numpy().astype(np.longdouble)
    y = after.double().numpy().astype(np.longdouble)
    d = y - x
    xx, yy, dd = (x * x).sum(-1), (y * y).sum(-1), (d * d).sum(-1)
    a, b = np.sqrt(xx), np.sqrt(yy)
    zero = (a == 0) | (b == 0)
    one = np.longdouble(1)
    projection = (x * y).sum(-1) / np.where(a == 0, one, xx)
    rest = y - projection[..., None] * x
    # The projection is rounded; what it leaves along x is taken out once more.
    rest = rest - ((x * rest).sum(-1) / np.where(a == 0, one, xx))[..., None] * x
    sine_squared = (rest * rest).sum(-1) / np.where(b == 0, one, yy)
    cosine = (x * y).sum(-1) / np.where(zero, one, a * b)
    distance = np.where(cosine > 0, sine_squared / (1 + np.abs(cosine)), 1 - cosine)
    distance = np.where(zero, np.where(a == b, 0, 1), distance)
    relative = np.where(a == 0, np.where(dd == 0, 0, 1), np.sqrt(dd) / np.where(a == 0, one, a))
    values = (distance, dd, np.abs(d).mean(-1), relative, a, b)
    return TokenMetrics(*(torch.from_numpy(np.asarray(v, dtype=np.float64)) for v in values))


def check_metrics(
    result: TokenMetrics, before: Tensor, after: Tensor, *, short_sums: bool = False
) -> None:
    """Compare with `exact_metrics`, each metric within its error bound.

    Backends sum exact products in float64, so that a sum of n positive terms is off by at most
    n * 2^-53, and round once to the result's dtype (eps / 2). The cosine distance subtracts
    (b - a)^2 from ||d||^2, which magnifies the error of the sums by ||d||^2 / (2 a b v).

    With `short_sums` (the cpu backend below float64) up to 52 additions are made in float32 before
    a sum is widened: at most 52 * 2^-24 of it, where the errors of all 52 point the same way;
    they do not, and a quarter of it is allowed here. The cosine distance is then computed from
    sums of which (b - a)^2 is at most 15/16 of ||d||^2, or from exact ones.

    Raises:
        AssertionError: which metric of which token, by how much.
    """
    exact = exact_metrics(before, after)
    eps = torch.finfo(result[0].dtype).eps
    summation = (before.shape[-1] + 16) * 2.0**-53
    short = 52 / 4 * 2.0**-24 if short_sums and before.dtype != torch.float64 else 0.0
    bound = torch.full_like(exact.cosine_distance, eps / 2 + 2 * summation + short)
    for name, got, wanted in zip(METRICS, result, exact, strict=True):
        limit = bound
        if name == "cosine_distance":
            product = 2 * exact.norm_before * exact.norm_after * wanted
            magnified = exact.squared_difference / product.where(product > 0, torch.inf)
            limit = bound + 4 * summation * magnified + short * magnified.clamp(max=16)
        largest = torch.finfo(got.dtype).max
        over = wanted > largest
        if bool((over & ~got.isinf()).any()):
            raise AssertionError(f"{name}: a value beyond {largest:.3g} must be inf, got {got}")
        smallest = torch.finfo(got.dtype).tiny  # below it the result's dtype loses digits itself
        # 1 - cos of parallel vectors is 0: what is left is the rounding of the sums.
        floor = smallest + (4 * summation if name == "cosine_distance" else 0) * (wanted < 1e-13)
        error = (got.double() - wanted).abs()
        failed = (error > limit * wanted.abs() + floor) & ~over
        if bool(failed.any()):
            index = tuple(failed.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}[{index}]: got {got[index].item()!r}, exact {wanted[index].item()!r}, "
                f"relative error {float(error[index] / wanted[index].abs()):.2e} above "
                f"{float(limit[index]):.2e}"
            )


def bytes_read(before: Tensor, after: Tensor) -> int:
    """Bytes that must be read once to measure this pair."""
    return before.numel() * before.element_size() + after.numel() * after.element_size()
