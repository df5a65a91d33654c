"""The operators: registration, validation of arguments, `row_sums`, `fold` and `token_metrics`.

Each operator has one overload per backend: `torch.ops.simdiff_kernels.token_metrics.cpu` and so
on. All have the signature of the function of that name in `simdiff_kernels.reference`, and take
hidden states `(outer, inner, hidden_size)` with a contiguous last dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._ops import add_op_namespace_prefix, ops
from .backends import (
    BACKENDS,
    load_cuda_extension,
    load_extension,
    resolve_backend,
)
from .metrics import (
    ALL_TOKENS,
    METRICS,
    ROW_SUMS,
    SUPPORTED_DTYPES,
    TokenMetrics,
    result_dtype,
)

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")

# Of each operator, the arguments that it writes. The signatures are those of the reference.
_WRITTEN = {
    "row_sums": ("sums",),
    "fold": ("moments", "counts", "per_token"),
    "token_metrics": (),
    "accumulate": ("moments", "counts", "per_token", "scratch"),
    "accumulate_blocks": ("moments", "counts", "sums", "scratch"),
}


def _schema(operator: str) -> str:
    """Arguments and result of an operator as torch writes them: `(Tensor before) -> Tensor`."""
    function = getattr(reference, operator)
    schema: str = torch.library.infer_schema(function, mutates_args=_WRITTEN[operator])
    return schema.replace("SymInt", "int")  # no int depends on a shape that is traced


def _triton(operator: str) -> Callable[..., Any]:
    """The Triton implementation, which imports triton when it is called first."""

    def call(*arguments: Any) -> Any:
        from . import triton

        return getattr(triton, operator)(*arguments)

    return call


def _nothing(*arguments: Any) -> None:
    """What torch.compile traces in place of an operator that only writes."""


def _token_metrics_fake(before: Tensor, after: Tensor) -> Tensor:
    return before.new_empty((len(METRICS), *before.shape[:2]), dtype=result_dtype(before.dtype))


# The compiled modules register "cpu" and "cuda"; Triton has no accumulate_blocks.
_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    operator: {"reference": getattr(reference, operator)}
    | ({} if operator == "accumulate_blocks" else {"triton": _triton(operator)})
    for operator in _WRITTEN
}
_FAKES = dict.fromkeys(_WRITTEN, _nothing) | {"token_metrics": _token_metrics_fake}


def _register() -> torch.library.Library:
    try:
        library = torch.library.Library(NAMESPACE, "DEF")
    except RuntimeError as error:
        raise ImportError(
            f"simdiff_kernels: another copy of it has registered its operators in this process; "
            f"this one is {__file__}. Keep one: python -m simdiff_kernels names them"
        ) from error
    for operator in _WRITTEN:
        schema = _schema(operator)
        for backend in BACKENDS:
            name = f"{operator}.{backend}"
            library.define(name + schema)
            fake = _FAKES[operator]
            torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=library)
            implementation = _IMPLEMENTATIONS[operator].get(backend)
            if implementation is not None:  # the rest is registered by the compiled modules
                library.impl(name, implementation, "CompositeExplicitAutograd")
    return library


_library = _register()
load_extension()
load_cuda_extension()
# Operator by name and backend, looked up once: a lookup costs as much as measuring a token.
OPERATORS = {
    operator: {backend: getattr(getattr(ops, operator), backend) for backend in BACKENDS}
    for operator in _WRITTEN
}


def has_implementation(operator: str, backend: str, device: torch.device) -> bool:
    """Whether an operator is registered for a backend on tensors of this kind of device."""
    key = "CUDA" if device.type == "cuda" else "CPU"
    name = add_op_namespace_prefix(f"{operator}.{backend}")
    return bool(torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key))


def check_hidden_states(
    function: str, before: Tensor, after: Tensor, *, names: tuple[str, str] = ("before", "after")
) -> None:
    """Refuse what cannot be scored; messages call the two tensors by `names`.

    Raises:
        TypeError: not tensors, or of a dtype that hidden states do not have.
        ValueError: shapes, dtypes or devices that differ, an empty tensor, no hidden dimension.
    """
    if (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and before.dtype in SUPPORTED_DTYPES
        and before.dtype is after.dtype
        and before.shape == after.shape
        and before.device == after.device
        and before.dim() > 0
        and before.numel() > 0
    ):  # the usual case, in half of the time that finding the fault takes
        return
    first, second = names
    for name, tensor in ((first, before), (second, after)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise TypeError(
                f"{function}: {name} must be float32, float64, bfloat16 or float16, "
                f"got {tensor.dtype}"
            )
    if before.dim() == 0:
        raise ValueError(f"{function}: {first} must have shape (..., hidden_size), got a scalar")
    if before.shape != after.shape:
        raise ValueError(
            f"{function}: {second} must have shape {tuple(before.shape)} like {first}, "
            f"got {tuple(after.shape)}"
        )
    if before.numel() == 0:
        raise ValueError(
            f"{function}: {first} must hold at least one token and one hidden entry, "
            f"got shape {tuple(before.shape)}"
        )
    if before.dtype != after.dtype:
        raise ValueError(
            f"{function}: {second} must be {before.dtype} like {first}, got {after.dtype}"
        )
    if before.device != after.device:
        raise ValueError(
            f"{function}: {second} must be on {before.device} like {first}, got {after.device}"
        )


def as_kinds(mask: Tensor) -> Tensor:
    """A bool mask as the kinds of tokens, uint8: COUNTED where it is True, LEFT_OUT elsewhere.

    The same memory; a copy where torch.compile traces it, as not every torch compiles the view.
    """
    return mask.to(torch.uint8) if torch.compiler.is_compiling() else mask.view(torch.uint8)


def as_mask(function: str, mask: Tensor | None, states: Tensor, name: str) -> Tensor | None:
    """The mask of tokens as contiguous bool; messages call the hidden states `name`.

    Raises:
        TypeError: a floating-point or complex mask.
        ValueError: a shape other than that of the tokens, or another device.
    """
    if mask is None:
        return None
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"{function}: mask must be bool or integer, 0 where a token is left out, "
            f"got {mask.dtype}"
        )
    if mask.shape != states.shape[:-1]:
        raise ValueError(
            f"{function}: mask must have shape {tuple(states.shape[:-1])} like the "
            f"tokens of {name}, got {tuple(mask.shape)}"
        )
    if mask.device != states.device:
        raise ValueError(
            f"{function}: mask must be on {states.device} like {name}, got {mask.device}"
        )
    return (mask if mask.dtype == torch.bool else mask.ne(0)).contiguous()


def as_rows(states: Tensor) -> Tensor:
    """View hidden states as `(outer, inner, hidden_size)`.

    Copies only where the hidden dimension is strided, or where more than two leading dimensions
    cannot be merged into two.
    """
    if states.requires_grad:
        states = states.detach()
    if states.dim() != 3:  # each view costs more than a microsecond
        states = states.flatten(0, -3) if states.dim() > 3 else states[(None,) * (3 - states.dim())]
    return states if states.stride(-1) == 1 or states.shape[-1] == 1 else states.contiguous()


def row_sums(
    before: Tensor,
    after: Tensor,
    mask: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """What one read of every token's two rows yields: the sums from which all metrics follow.

    With x the hidden state that enters a layer, y the one that leaves it and d = y - x, summed over
    the hidden dimension: sum x^2, sum y^2, sum d^2, sum |d|. `fold` turns them into running scores.

    Args:
        before: hidden states x, `(..., hidden_size)`; float32, bfloat16, float16 or float64; any
            strides (a strided last dimension is copied first).
        after: hidden states y; shape, dtype and device of `before`.
        mask: `(...)`, bool or integer; where it is zero nothing is read and zeros are written.
        out: float64 `(..., 4)`, contiguous, on the same device; None allocates it.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the fastest one for the device.

    Returns:
        float64 `(..., 4)`, in the order of `ROW_SUMS`: `out` where it was given.

    Raises:
        TypeError: wrong dtype.
        ValueError: shapes, dtypes or devices that do not fit, an empty tensor, a backend that is
            unknown or cannot run here.

    Source: the sums behind SimDiff, arXiv 2604.19520, Eq. 1-5.
    """
    check_hidden_states("row_sums", before, after)
    mask = as_mask("row_sums", mask, before, "before")
    shape = (*before.shape[:-1], len(ROW_SUMS))
    if out is None:
        out = before.new_empty(shape, dtype=torch.float64)
    elif (out.shape, out.dtype, out.device) != (shape, torch.float64, before.device):
        raise ValueError(
            f"row_sums: out must be float64 of shape {shape} on {before.device}, got {out.dtype} "
            f"of shape {tuple(out.shape)} on {out.device}"
        )
    elif not out.is_contiguous():
        raise ValueError(f"row_sums: out must be contiguous, got strides {out.stride()}")
    x, y = as_rows(before), as_rows(after)
    name = resolve_backend(backend, before.device)
    OPERATORS["row_sums"][name](out.view(*x.shape[:2], len(ROW_SUMS)), x, y, mask)
    return out


def fold(
    moments: Tensor,
    counts: Tensor,
    sums: Tensor,
    hidden_size: int,
    kinds: Tensor | None = None,
    *,
    first_state: int = 0,
    offset: int = 0,
    tokens_per_state: int = ALL_TOKENS,
    apart: bool = False,
    backend: str | None = None,
) -> None:
    """Fold the row sums of all layers of a batch into running states, in place, in one launch.

    The sums of a token become its six metrics (`TokenMetrics`), and these are added to the sums,
    sums of squares and maxima of the state that the token belongs to. Token t of the batch, counted
    in row-major order, belongs to state `first_state + (offset + t) // tokens_per_state`, and to
    none where there is no such state; tokens of kind `APART` belong to the last one instead, which
    `apart` reserves for them. By default the first state takes all tokens. A token with a NaN or
    Inf is counted and left out.

    Args:
        moments: float64 `(states, layers, 3, num_metrics)`, from `empty_state`.
        counts: int64 `(states, layers, num_metrics + 3)`, from `empty_state`.
        sums: float64 `(layers, outer, inner, 4)`, contiguous: what `row_sums` returned of hidden
            states `(outer, inner, hidden_size)` before and after each layer.
        hidden_size: of these hidden states.
        kinds: uint8 `(outer, inner)`, contiguous: `LEFT_OUT`, `COUNTED` or `APART`; None counts
            all tokens.
        first_state, offset, tokens_per_state, apart: which token belongs to which state, see above.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the fastest one for the device.

    `summary_of` reads the states. What they hold is told by `simdiff_kernels.reference.fold`.

    Raises:
        ValueError: a backend that is unknown or cannot run here.
        RuntimeError: shapes, dtypes or devices that do not fit; the states stay as they were.
    """
    name = resolve_backend(backend, sums.device)
    OPERATORS["fold"][name](
        moments, counts, sums, hidden_size, kinds, first_state, offset, tokens_per_state, apart
    )


def token_metrics(before: Tensor, after: Tensor, *, backend: str | None = None) -> TokenMetrics:
    """Measure, for every token, how a layer changed its hidden state: one read of each input.

    Cosine distance 1 - cos(x, y), squared difference sum (y - x)^2, absolute difference
    sum |y - x| / hidden_size, relative difference ||y - x|| / ||x||, and both norms; see
    `TokenMetrics`. All are summed in float64, so the cosine distance keeps its relative accuracy
    down to near-identical states. Not differentiable.

    Args:
        before: hidden states that enter the layer, `(..., hidden_size)`; float32, bfloat16,
            float16 or float64; any strides (a strided last dimension is copied first).
        after: hidden states that leave it; shape, dtype and device of `before`.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the fastest one for the device.

    Returns:
        Tensors of the leading shape `(...)`: float64 for float64 states, float32 otherwise.

    Raises:
        TypeError: wrong dtype.
        ValueError: shapes, dtypes or devices that differ, an empty tensor, a backend that is
            unknown or cannot run here.

    Source: SimDiff, arXiv 2604.19520, Eq. 1-5.
    """
    check_hidden_states("token_metrics", before, after)
    name = resolve_backend(backend, before.device)
    values = OPERATORS["token_metrics"][name](as_rows(before), as_rows(after))
    return TokenMetrics(*values.reshape(-1, *before.shape[:-1]).unbind(0))
