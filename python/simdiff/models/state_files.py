"""Hidden states of many windows: in memory within a bound, and in files that outlive a kill.

A set holds the states of all batches at one depth. Sets are written beside the computation; once a
layer is finished and its sets are on the disk, the manifest that names them is replaced as a whole.
So a run that is killed goes on from the last finished layer.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from simdiff.errors import SimdiffError
from simdiff.io.json_files import check_key, header, read_json, write_json
from simdiff.io.outputs import held_directory
from simdiff.models.gpu_copies import Event, GpuCopies
from simdiff.models.tensor_reader import bytes_of

SCHEMA = "simdiff.states"
_RUN, MANIFEST = "run.json", "manifest.json"
DONE = "losses.safetensors"
"""What a finished pass leaves in place of its states."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WAITING = 2
"""Batches that may wait to be written."""
_READERS = 4
"""Files that are read at a time."""


class OffloadFolder:
    """A folder for the hidden states of the passes of one run; `remove` takes it away.

    Args:
        path: it is made where it does not exist; its parent must.
        key: everything that all passes depend on: the model, its files, dtype and device.

    Raises:
        SimdiffError: the folder cannot be written, is in use, holds other files, or is of another
            run.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        """Make or take the folder."""
        self.path = path.absolute()
        self._made = not self.path.exists()
        with self.held():
            self._take(key)

    def held(self) -> AbstractContextManager[None]:
        """Lock the folder against other processes inside a with block."""
        return held_directory(self.path, "streamed pass")

    def _take(self, key: Mapping[str, Any]) -> None:
        run = self.path / _RUN
        for leftover in self.path.glob(f".{_RUN}.*"):  # of a run that was killed while it began
            leftover.unlink()
        if run.exists():
            content = read_json(run, SCHEMA)
            check_key(run, content.get("key"), key)
            self._made = bool(content["made"])
        elif any(self.path.iterdir()):
            raise SimdiffError(
                f"offload folder {self.path}: must be new or empty, and holds other files: give "
                "another one"
            )
        try:
            write_json(run, {**header(SCHEMA), "key": dict(key), "made": self._made})
        except OSError as error:
            raise SimdiffError(
                f"offload folder {self.path}: cannot be written: {error.strerror}"
            ) from None

    def directory(self, purpose: str, course: Any) -> Path:
        """The directory of one pass.

        Args:
            purpose: of the pass, such as "score".
            course: what else tells it from others: the tokens that it reads, the plans.

        Raises:
            SimdiffError: another pass of this purpose was begun here and never finished.
        """
        name = re.sub(r"\W+", "-", purpose)
        digest = hashlib.sha256(json.dumps(course, sort_keys=True).encode()).hexdigest()[:16]
        directory = self.path / f"{name}-{digest}"
        for other in [] if directory.exists() else self.path.glob(f"{name}-{'?' * 16}"):
            if (other / MANIFEST).exists() and not (other / DONE).exists():
                raise SimdiffError(
                    f"offload folder {self.path} is of another run, which differs in the text, the "
                    f"windows or the plans of its pass {purpose!r}: remove it, or give another one"
                )
        directory.mkdir(exist_ok=True)
        return directory

    def remove(self) -> None:
        """Remove what the passes left, and the folder where it was made for them."""
        for entry in self.path.iterdir():
            if re.fullmatch(r".+-[0-9a-f]{16}", entry.name) and entry.is_dir():
                shutil.rmtree(entry)
        (self.path / _RUN).unlink()  # last: a folder without it is somebody else's
        if self._made:
            with contextlib.suppress(OSError):  # other files in it stay
                self.path.rmdir()


class StateSets:
    """The sets of hidden states of one pass.

    Args:
        directory: of the pass, see `OffloadFolder.directory`; None keeps everything in memory.
        memory: bytes that may lie in memory.
        device: where states are wanted.
    """

    def __init__(self, directory: Path | None, memory: int, device: torch.device) -> None:
        """Read the manifest of an earlier run."""
        self.directory = directory
        self.manifest: dict[str, Any] = {}
        """As it was found: `layer`, `frontier` and what `commit` was given besides."""
        self._memory, self._device = memory, device
        self._gpu = GpuCopies.of(device)
        self._tensors: dict[str, dict[int, Tensor]] = {}
        self._held_bytes = 0
        self._shapes: dict[int, list[int]] = {}
        self._members: dict[str, list[int]] = {}
        """The batches of each set, in the order of its file."""
        self._dtype = torch.float32
        self._writer = ThreadPoolExecutor(1)
        self._waiting: list[Future[None]] = []
        self._failed = False
        self._open: dict[str, BinaryIO] = {}
        if directory is not None and (directory / MANIFEST).exists():
            self.manifest = read_json(directory / MANIFEST, SCHEMA)
            self._shapes = {int(batch): found for batch, found in self.manifest["shapes"].items()}
            self._members = self.manifest["members"]
            self._dtype = getattr(torch, self.manifest["dtype"])

    def put(self, name: str, batch: int, states: Tensor) -> None:
        """Add the states of a batch to a set.

        Raises:
            SimdiffError: the disk is full, or neither memory nor a folder is there for them.
        """
        self._shapes[batch], self._dtype = list(states.shape), states.dtype
        self._members.setdefault(name, []).append(batch)
        num_bytes = states.numel() * states.element_size()
        older = iter([other for other in self._tensors if other != name])
        while self.directory is not None and self._held_bytes + num_bytes > self._memory:
            oldest = next(older, None)
            if oldest is None:
                break
            self._drop(oldest)
        if self._held_bytes + num_bytes <= self._memory:
            self._tensors.setdefault(name, {})[batch] = states
            self._held_bytes += num_bytes
        elif self.directory is None:
            raise SimdiffError(
                f"the hidden states of all windows take more than {self._memory:,} bytes of "
                "memory: give more (--stream-memory), or a folder (--offload-folder)"
            )
        if self.directory is not None:
            copied = (states,) if self._gpu is None else self._gpu.to_main(states)
            self._submit(self._write_copied, name, *copied)

    def get(self, name: str, batch: int) -> Tensor:
        """The states of a batch."""
        return self._found(name, batch).to(self._device, non_blocking=True)

    def get_all(self, names: Sequence[str], batch: int) -> list[Tensor]:
        """The states of a batch in several sets."""
        if all(batch in self._tensors.get(name, {}) for name in names):
            return [self._tensors[name][batch] for name in names]
        self._wait(0)
        with ThreadPoolExecutor(_READERS) as readers:
            found = readers.map(self._found, names, [batch] * len(names))
            return [states.to(self._device, non_blocking=True) for states in found]

    def _found(self, name: str, batch: int) -> Tensor:
        """The states of a batch, in main memory where they are not on the device."""
        found = self._tensors.get(name, {}).get(batch)
        return self._read(name, batch) if found is None else found

    @property
    def free_bytes(self) -> int:
        """How many more bytes may lie in memory."""
        return max(0, self._memory - self._held_bytes)

    def commit(self, names: Sequence[str], **content: Any) -> None:
        """Finish a layer: drop all sets but these, and write them and the manifest to the disk."""
        for name in [name for name in self._tensors if name not in names]:
            self._drop(name)
        self._members = {name: self._members[name] for name in names}
        if self.directory is not None:
            content |= {"shapes": dict(self._shapes), "members": dict(self._members)}
            content["dtype"] = str(self._dtype).removeprefix("torch.")
            held = {
                name
                for name, batches in self._members.items()
                if len(self._tensors.get(name, {})) == len(batches)
            }
            self._submit(self._finish, held, content)

    def _drop(self, name: str) -> None:
        """Forget a set in memory."""
        states = self._tensors.pop(name)
        self._held_bytes -= sum(one.numel() * one.element_size() for one in states.values())

    def close(self) -> None:
        """Wait for what is still to be written."""
        try:
            self._wait(0)
        finally:
            self._writer.shutdown()
            for file in self._open.values():
                file.close()

    def _submit(self, function: Any, *arguments: Any) -> None:
        self._wait(_WAITING)
        self._waiting.append(self._writer.submit(self._unless_failed, function, *arguments))

    def _unless_failed(self, function: Any, *arguments: Any) -> None:
        """Once a write has failed, no later one may finish the layer."""
        if not self._failed:
            self._failed = True
            function(*arguments)
            self._failed = False

    def _wait(self, most: int) -> None:
        """Wait until no more than this many writes are left; raise what went wrong in one."""
        while len(self._waiting) > most or (self._waiting and self._waiting[0].done()):
            with self.full_disk():
                self._waiting.pop(0).result()

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Say what to do where the disk is full, inside a with block."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise SimdiffError(
                f"offload folder {self.directory}: the disk is full; what is finished stays: make "
                "room and give the same command again"
            ) from None

    def _write_copied(self, name: str, states: Tensor, event: Event | None = None) -> None:
        """Write states once they are in main memory."""
        if event is not None:
            event.synchronize()
        self._write(name, states)

    def _write(self, name: str, states: Tensor) -> None:
        assert self.directory is not None
        if name not in self._open:
            self._open[name] = (self.directory / name).open("wb", buffering=0)
        flat = states.detach().contiguous().reshape(-1).view(torch.uint8)
        view = bytes_of(flat)
        while view:
            view = view[self._open[name].write(view) :]

    def _finish(self, held: Collection[str], content: dict[str, Any]) -> None:
        """Let the manifest name the sets that were written; those of `held` lie in memory too."""
        assert self.directory is not None
        for name, file in self._open.items():
            os.fsync(file.fileno())
            if name in held and hasattr(os, "posix_fadvise"):
                # Only a run after a kill reads it: the system need not keep a copy in memory, whose
                # pages the next layer's states take. Fresh ones cost three times as much.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.close()
        self._open.clear()
        write_json(self.directory / MANIFEST, {**header(SCHEMA), **content})
        for path in self.directory.iterdir():
            if path.name not in (*content["members"], MANIFEST):
                path.unlink()

    def _num_bytes(self, batch: int) -> int:
        return math.prod(self._shapes[batch]) * self._dtype.itemsize

    def _read(self, name: str, batch: int) -> Tensor:
        """From its file."""
        assert self.directory is not None
        self._wait(0)
        members = self._members[name]
        before = members[: members.index(batch)]
        pinned = self._gpu is not None
        flat = torch.empty(self._num_bytes(batch), dtype=torch.uint8, pin_memory=pinned)
        with (self.directory / name).open("rb", buffering=0) as file:
            file.seek(sum(map(self._num_bytes, before)))
            view = bytes_of(flat)
            while view:
                count = file.readinto(view)
                if not count:
                    raise SimdiffError(f"{self.directory / name}: became shorter: start again")
                view = view[count:]
        return flat.view(self._dtype).view(self._shapes[batch])


def check_free(directory: Path, num_bytes: int) -> None:
    """Refuse a pass whose states would not fit on the disk, beside those that lie there already.

    Raises:
        SimdiffError: tells the bytes needed and free.
    """
    there = sum(path.stat().st_size for path in directory.iterdir())
    free, wanted = shutil.disk_usage(directory).free, max(0, num_bytes - there)
    if free < wanted:
        raise SimdiffError(
            f"the disk of {directory} must have {wanted:,} bytes free for the hidden states of all "
            f"windows, got {free:,}: free {math.ceil((wanted - free) / 1e7) / 100:.2f} GB, or give "
            "--offload-folder elsewhere"
        )
