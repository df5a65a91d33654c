"""One list of cases for tests and benchmarks, the exact result, and what counts as accurate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simdiff_kernels.blocks import RunningBlockScores
from simdiff_kernels.metrics import BLOCK_METRICS, METRICS, TokenMetrics, angular_distance
from simdiff_kernels.running import RunningScores

# What sums in float32 may be off by, relative. Up to 52 additions follow each other before a sum is
# widened, each rounded by at most half a unit in the last place, 2^-24 of the sum. Spread evenly
# over that, an error has a standard deviation of 2^-24 / sqrt(3); of 52 independent ones the sum
# has sqrt(52 / 3) 2^-24 at most, because the partial sums are below the last. Three of those.
SHORT_SUMS = 3 * math.sqrt(52 / 3) * 2.0**-24
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


def exact_metrics(before: Tensor, after: Tensor) -> TokenMetrics:
    """The metrics of exactly these values in extended precision, by an independent computation.

    NumPy's longdouble has 64 bits of mantissa on x86; the cosine distance comes from the part of
    y that is orthogonal to x, not from norms as in the backends.
    """
    values = _exact_values(before, after)
    return TokenMetrics(*(values[name] for name in METRICS))


def exact_block_metrics(before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """Each of `BLOCK_METRICS` of exactly these values, computed as by `exact_metrics`.

    The angle is that between y and x in their plane, from sine and cosine.
    """
    values = _exact_values(before, after)
    return {name: values[name] for name in BLOCK_METRICS}


def _exact_values(before: Tensor, after: Tensor) -> dict[str, Tensor]:
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
    angle = np.arctan2(np.sqrt(sine_squared), cosine) / np.arccos(-one)
    angle = np.where(zero, np.where(a == b, 0, one / 2), angle)
    values = {
        "cosine_distance": distance,
        "squared_difference": dd,
        "absolute_difference": np.abs(d).mean(-1),
        "relative_difference": relative,
        "norm_before": a,
        "norm_after": b,
        "angular_distance": angle,
    }
    return {k: torch.from_numpy(np.asarray(v, dtype=np.float64)) for k, v in values.items()}


def check_metrics(
    result: TokenMetrics, before: Tensor, after: Tensor, *, short_sums: bool = False
) -> None:
    """Compare with `exact_metrics`, each metric within its error bound.

    Backends sum exact products in float64, so that a sum of n positive terms is off by at most
    n * 2^-53, and round once to the result's dtype (eps / 2). The cosine distance subtracts
    (b - a)^2 from ||d||^2, which magnifies the error of the sums by ||d||^2 / (2 a b v); b - a
    comes from b^2 - a^2, so that it is off by the error of a and b, and its square by 2 |b - a|
    times as much.

    With `short_sums` (the cpu backend below float64; for all blocks every one but the reference)
    some additions are made in float32, and `SHORT_SUMS` is allowed for them. The cosine distance is
    then computed from sums of which (b - a)^2 is at most 15/16 of ||d||^2, or from exact ones.

    Raises:
        AssertionError: which metric of which token, by how much.
    """
    exact = exact_metrics(before, after)
    for name, got, wanted in zip(METRICS, result, exact, strict=True):
        limit = _limit(exact, before, got.dtype, short_sums)
        if name == "cosine_distance":
            limit = _cosine_limit(exact, wanted, before, got.dtype, short_sums)
        largest = torch.finfo(got.dtype).max
        over = wanted > largest
        if bool((over & ~got.isinf()).any()):
            raise AssertionError(f"{name}: a value beyond {largest:.3g} must be inf, got {got}")
        smallest = torch.finfo(got.dtype).tiny  # below it the result's dtype loses digits itself
        # 1 - cos of parallel vectors is 0: what is left is the rounding of the sums.
        floor = smallest + (4 * _summation(before) if name == "cosine_distance" else 0) * (
            wanted < 1e-13
        )
        error = (got.double() - wanted).abs()
        failed = (error > limit * wanted.abs() + floor) & ~over
        if bool(failed.any()):
            index = tuple(failed.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}[{index}]: got {got[index].item()!r}, exact {wanted[index].item()!r}, "
                f"relative error {float(error[index] / wanted[index].abs()):.2e} above "
                f"{float(limit[index]):.2e}"
            )


def _summation(before: Tensor) -> float:
    return (before.shape[-1] + 16) * 2.0**-53


def _short(before: Tensor, short_sums: bool) -> float:
    return SHORT_SUMS if short_sums and before.dtype != torch.float64 else 0.0


def _limit(exact: TokenMetrics, before: Tensor, dtype: torch.dtype, short_sums: bool) -> Tensor:
    bound = torch.finfo(dtype).eps / 2 + 2 * _summation(before) + _short(before, short_sums)
    return torch.full_like(exact.cosine_distance, bound)


def _cosine_limit(
    exact: TokenMetrics, value: Tensor, before: Tensor, dtype: torch.dtype, short_sums: bool
) -> Tensor:
    """Of `value`, which is 1 - cos or 1 + cos: a difference of squares over 2 a b."""
    summation, short = _summation(before), _short(before, short_sums)
    product = 2 * exact.norm_before * exact.norm_after * value
    product = product.where(product > 0, torch.inf)
    magnified = exact.squared_difference / product
    a, b = exact.norm_before, exact.norm_after
    gap = (b - a).abs() * torch.maximum(a, b)
    limit = _limit(exact, before, dtype, short_sums)
    limit = limit + 4 * summation * magnified + short * magnified.clamp(max=16)
    return limit + 4 * summation * gap / product


def check_angles(
    angles: Tensor, before: Tensor, after: Tensor, *, short_sums: bool = False
) -> None:
    """Compare float64 angular distances with those of `exact_block_metrics`.

    With v the cosine distance and e the error of it that `check_metrics` allows, an angle may be
    off by as much as those of v - e and v + e differ, and by the 6e-16 of itself of a polynomial.
    Where v > 1, e is the error of 2 - v: sums in float32 are only used where (a + b)^2 is not
    nearly ||d||^2.

    Raises:
        AssertionError: which angle, by how much.
    """
    exact = exact_metrics(before, after)
    wanted = exact_block_metrics(before, after)["angular_distance"]
    v = exact.cosine_distance
    nearest = torch.minimum(v, 2 - v)
    limit = _cosine_limit(exact, nearest, before, torch.float64, short_sums)
    error = limit * nearest + torch.where(nearest < 1e-13, 4 * _summation(before), 0.0)
    lower, upper = (angular_distance((v + e).clamp(0, 2)) for e in (-error, error))
    allowed = upper - lower + 6e-16 * wanted
    failed = ~((angles - wanted).abs() <= allowed)
    if bool(failed.any()):
        index = tuple(failed.nonzero()[0].tolist())
        raise AssertionError(
            f"angular_distance[{index}]: got {angles[index].item()!r}, exact "
            f"{wanted[index].item()!r}, may be off by {float(allowed[index]):.2e}"
        )


def check_token_blocks(
    moments: Tensor, states: Sequence[Tensor], *, short_sums: bool = False, absolute: bool = True
) -> None:
    """Compare the state after one token with the exact metrics of all pairs.

    `states` are its hidden states, `(hidden_size,)` each. The bounds are those of `check_metrics`,
    a block is measured like a layer, and of `check_angles`. Without `absolute` the moments of the
    absolute difference must be zero.

    Raises:
        AssertionError: which metric of which pair, by how much; a sum of squares or a maximum that
            does not belong to its sum; an entry [i, j] with i >= j that is not zero.
    """
    num_metrics = len(BLOCK_METRICS)
    i, j = torch.triu_indices(len(states), len(states), offset=1).unbind(0)
    stacked = torch.stack([state.cpu() for state in states])
    before, after = stacked[i], stacked[j]
    sums, squares, maximum = moments[:num_metrics], moments[num_metrics:-1], moments[-1]
    found = dict(zip(BLOCK_METRICS, sums[:, i, j].unbind(0), strict=True))
    angles = found.pop("angular_distance")
    if not absolute and bool(found.pop("absolute_difference").any()):
        raise AssertionError("the absolute difference was not asked for")
    result = exact_metrics(before, after)._replace(**found)
    check_metrics(result, before, after, short_sums=short_sums)
    check_angles(angles, before, after, short_sums=short_sums)
    if not torch.allclose(squares, sums.square(), rtol=1e-15, atol=0):
        raise AssertionError("sums of squares of one token must be the squares of its sums")
    if not torch.equal(maximum, sums[BLOCK_METRICS.index("squared_difference")]):
        raise AssertionError("the maximum over one token must be its squared difference")
    if bool(moments.tril().any()):
        raise AssertionError("entries [i, j] with i >= j must be zero")


def joined_state(scores: RunningScores | RunningBlockScores) -> dict[str, Tensor]:
    """`moments` and `counts` on the host, the parts of a GPU joined: the same for all backends."""
    moments, counts = scores._on_host()
    return {"moments": moments, "counts": counts}
