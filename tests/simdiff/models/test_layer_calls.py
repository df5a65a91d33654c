"""Hooks are on all modules or on none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import nn
from torch.utils.hooks import RemovableHandle

from simdiff.models.layer_calls import HookHandles


class Two(HookHandles):
    """A hook on each of two modules; the second may not take one."""

    def __init__(self, modules: list[nn.Module], refuses: bool) -> None:
        super().__init__()
        self.modules, self.refuses = modules, refuses

    def _register(self) -> Iterator[RemovableHandle]:
        yield self.modules[0].register_forward_hook(lambda *_: None)
        if self.refuses:
            raise RuntimeError("no")
        yield self.modules[1].register_forward_hook(lambda *_: None)


def test_hooks_are_on_all_modules_or_on_none() -> None:
    modules: list[nn.Module] = [nn.Identity(), nn.Identity()]

    def counts() -> list[int]:
        return [len(module._forward_hooks) for module in modules]

    with Two(modules, refuses=False) as two:
        assert isinstance(two, Two)
        assert counts() == [1, 1]
    assert counts() == [0, 0]
    with pytest.raises(RuntimeError, match="no"), Two(modules, refuses=True):
        pytest.fail("entered")
    assert counts() == [0, 0]
    with pytest.raises(ValueError, match="within"), Two(modules, refuses=False):
        raise ValueError("within")
    assert counts() == [0, 0]
