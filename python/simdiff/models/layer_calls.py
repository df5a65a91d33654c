"""Find and replace the hidden states in the arguments and the output of a decoder layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from simdiff.errors import SimdiffError

Hooks = TypeVar("Hooks", bound="HookHandles")


class HookHandles:
    """Hooks that are on modules while it is entered: all of them, or after an error none."""

    def __init__(self) -> None:
        """Register nothing yet."""
        self._handles: list[RemovableHandle] = []

    def _register(self) -> Iterator[RemovableHandle]:
        """Register one hook after the other."""
        raise NotImplementedError

    def __enter__(self: Hooks) -> Hooks:
        """Register the hooks."""
        try:
            for handle in self._register():
                self._handles.append(handle)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks, also after an error."""
        self._remove()

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def entering(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state that enters layer `index`, from the arguments of its forward.

    Raises:
        SimdiffError: the state is neither the first argument nor called `hidden_states`.
    """
    states = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(states, Tensor):
        raise SimdiffError(
            f"layer {index} must receive its hidden state first or as hidden_states, "
            f"got {type(states).__name__} and keywords {sorted(kwargs)}"
        )
    return states


def leaving(index: int, output: Any) -> Tensor:
    """The hidden state that leaves layer `index`, from what its forward returned.

    Raises:
        SimdiffError: the layer returned neither a tensor nor a tuple that starts with one.
    """
    # Layers of transformers 5 return a tensor, earlier ones a tuple. `output[0]` of a tensor would
    # silently be the first sequence of the batch.
    states = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(states, Tensor):
        raise SimdiffError(
            f"layer {index} must return a tensor or a tuple that starts with one, "
            f"got {type(output).__name__}"
        )
    return states


def with_entering(
    states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer's forward with another hidden state."""
    if args:
        return (states, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": states}
