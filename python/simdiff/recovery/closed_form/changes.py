"""Changed parameters of a model, which can be undone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Change:
    """The new and the old parameters of a corrected module."""

    module: nn.Module
    old: dict[str, nn.Parameter | None]
    new: dict[str, nn.Parameter | None]

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """The module as it was, inside a with block."""
        self.module._parameters.update(self.old)
        try:
            yield
        finally:
            self.module._parameters.update(self.new)


@contextlib.contextmanager
def changing(modules: Iterable[nn.Module], changes: list[Change]) -> Iterator[None]:
    """Add what is done to modules inside a with block to a list of changes."""
    before = [(module, dict(module._parameters)) for module in modules]
    yield
    changes += [Change(module, old, dict(module._parameters)) for module, old in before]
