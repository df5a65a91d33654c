"""When sums formed in float32 (short sums) may be used: the constants of csrc/common/trust.h.

That header derives them. Triton's kernel, `reference.float32_is_enough` and the tolerances of
`simdiff_kernels.testing` take them from here; tests/kernels/test_trust.py compares both files. With
a token's rows x and y and d = y - x, short sums suffice where

    SMALLEST_SHORT < sum x^2, sum y^2, sum d^2 < LARGEST_SHORT,
    sum y^2 > SHORTEST_AFTER sum x^2,   and   (||y|| - ||x||)^2 <= MOST_CANCELLED sum d^2,

or where d is zero. Elsewhere the row is summed again in float64.
"""

from __future__ import annotations

SMALLEST_SHORT = 1e-24
"""Of sums of squares: below it float32 loses entries whose squares underflow."""
LARGEST_SHORT = 1e30
"""Of sums of squares: far enough below float32's largest number for the test itself."""
SHORTEST_AFTER = 1 / 16
"""Of sum y^2 to sum x^2: below it too much is lost of x^2 + 2 x d + d^2."""
MOST_MAGNIFIED = 16
"""By how much the error of sum d^2 may grow in the cosine distance, 1 - cos or 1 + cos."""
MOST_CANCELLED = 1 - 1 / MOST_MAGNIFIED
"""Of (||y|| - ||x||)^2 to sum d^2, whose difference is the cosine distance's numerator."""
