"""The metrics of a pair of hidden states in extended precision, computed as no backend does it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..metrics import BLOCK_METRICS, METRICS, TokenMetrics


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
