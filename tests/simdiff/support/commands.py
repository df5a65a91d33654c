"""The command run in this process."""

from __future__ import annotations

from simdiff import cli

SMALL = ("--num-windows", "4", "--window-length", "16")


def simdiff(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])
