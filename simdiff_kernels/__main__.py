"""`python -m simdiff_kernels`: what works on this machine, what to do about what does not."""

from __future__ import annotations

import sys


def main() -> int:
    """Print it; returns the exit code."""
    try:
        from .installation import describe_installation

        lines = describe_installation()
    except ImportError as error:  # no torch, one that is too old, two copies
        print(f"Nothing works: {error}")
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
