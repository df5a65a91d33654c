"""Methods of recovery and their options."""

from __future__ import annotations

import pytest

from simdiff.errors import SimdiffError
from simdiff.recovery.methods import check_options


def test_options_of_methods() -> None:
    assert check_options("closed-form", {"features": "outputs"}).function().__name__ == "recover"
    with pytest.raises(SimdiffError, match="method must be one of closed-form"):
        check_options("magic", {})
    with pytest.raises(SimdiffError, match="options of method closed-form are .*, got rank"):
        check_options("closed-form", {"rank": 8})
