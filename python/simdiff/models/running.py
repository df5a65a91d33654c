"""Run a model that somebody else owns: in evaluation mode inside, as it was afterwards."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from simdiff.models.config import parts

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Model = TypeVar("Model", bound=nn.Module)

_PLAIN_OUTPUT = {"return_dict": True, "output_hidden_states": False, "_output_attentions": False}
"""Config entries that make a forward return one object, without states that nobody reads."""


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Everything that runs a given model runs in here.

    Inside the with block the models are in evaluation mode, a forward returns an object with the
    logits alone, and what was compiled runs uncompiled, so that hooks are called. Afterwards the
    mode of every module, the config and the frequencies of rotary embeddings, which long inputs may
    change, are as before. May be nested.
    """
    with contextlib.ExitStack() as stack:
        for model in models:
            modules = list(model.modules())
            modes = [(module, module.training) for module in modules]
            if any(training for _, training in modes):
                stack.callback(_restore_modes, modes)
                model.eval()
            for config in parts(getattr(model, "config", None)):
                _set_entries(stack, vars(config), _PLAIN_OUTPUT)
            for module in modules:
                if hasattr(module, "max_seq_len_cached"):
                    stack.callback(_restore_rotary, module, *_rotary_state(module))
            if any(module._compiled_call_impl is not None for module in modules):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def in_evaluation(
    function: Callable[Concatenate[Model, Parameters], Result],
) -> Callable[Concatenate[Model, Parameters], Result]:
    """Decorate a function that runs its first argument, a model: see `evaluating`."""

    @functools.wraps(function)
    def wrapped(model: Model, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with evaluating(model):
            return function(model, *args, **kwargs)

    return wrapped


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _set_entries(
    stack: contextlib.ExitStack, entries: dict[str, Any], wanted: dict[str, bool]
) -> None:
    """Set those of the entries that are there and differ, until the stack closes."""
    for name, value in wanted.items():
        if entries.get(name, value) not in (value, None):
            stack.callback(entries.__setitem__, name, entries[name])
            entries[name] = value


def _rotary_state(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plain attributes and buffers of a rotary embedding."""
    plain = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, (int, float)) and key != "training"
    }
    buffers = {
        name: (buffer, buffer.clone())
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
    return plain, buffers


def _restore_rotary(module: nn.Module, plain: dict[str, Any], buffers: dict[str, Any]) -> None:
    vars(module).update(plain)
    with torch.inference_mode():  # the buffer may have been replaced, or written to
        for name, (buffer, content) in buffers.items():
            module._buffers[name] = buffer.copy_(content)
