"""Several processes as a launcher starts them, forked so that none has to load torch again."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from simdiff.io.progress import console


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: the signal), and what it printed."""

    code: int
    output: str
    errors: str


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Processes:
    """`count` processes that call `body(rank)` with the variables that torchrun sets."""

    def __init__(self, count: int, body: Callable[[int], int], folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        port = free_port()
        self.pids = [self._start(rank, count, port, body) for rank in range(count)]

    def _start(self, rank: int, count: int, port: int, body: Callable[[int], int]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            for number, stream in ((1, "output"), (2, "errors")):
                file = os.open(self.folder / f"{stream}-{rank}", os.O_CREAT | os.O_WRONLY)
                os.dup2(file, number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            torch.set_num_threads(1)  # the pool of threads is not forked
            console.file = sys.stderr
            os.environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            code = body(rank)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float = 60) -> list[Ended]:
        """How all ended; what still runs after so many seconds is killed, and the test fails."""
        limit = time.monotonic() + seconds
        codes: dict[int, int] = {}
        while len(codes) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                if rank not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(ended[1])
            if time.monotonic() > limit:
                left = [rank for rank in range(len(self.pids)) if rank not in codes]
                for rank in left:
                    os.kill(self.pids[rank], signal.SIGKILL)
                    os.waitpid(self.pids[rank], 0)
                raise AssertionError(f"processes {left} still ran after {seconds} s")
            time.sleep(0.01)
        return [
            Ended(
                codes[rank],
                (self.folder / f"output-{rank}").read_text(),
                (self.folder / f"errors-{rank}").read_text(),
            )
            for rank in range(len(self.pids))
        ]
