"""Several processes that share one job, as `torchrun` and `accelerate launch` start them.

Both set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; `processes` then connects the processes by
torch.distributed. What they exchange are Python objects in the main memory (gloo): running states,
losses, errors. Everything here is a no-op in a single process.

Every process goes through the same calls in the same order. Work is divided into runs of
consecutive items, results come back in the order of the items, and an error in one process is
raised in all of them, so that all take the same decisions. Process 0 alone prints and writes.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import hashlib
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from simdiff.errors import SimdiffError, SurgeryError

Item = TypeVar("Item")
Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")

_WANTED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How long a process waits for the others to start, and for one that has more to do. A process that
# ends closes its connections, which the others see at once.
_START = datetime.timedelta(minutes=5)
_WAIT = datetime.timedelta(days=1)

# Within which processes connect that are to find out whether all failed, and find it out.
_TOGETHER = datetime.timedelta(seconds=15)

_group: Any = None
_local = 0, 1
_failures: Any = None
_alone = 0


class ElsewhereError(Exception):
    """Raised in a process because another one failed, which has told why."""


def announced() -> tuple[int, int]:
    """The number of this process and of all that were started, by the environment alone.

    Raises:
        SimdiffError: a variable is not a number, or the number is none of the processes'.
    """
    if any(name not in os.environ for name in _WANTED):
        return 0, 1
    try:
        found = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        found = (-1, 0)
    if not 0 <= found[0] < found[1]:
        raise SimdiffError(
            f"RANK must be a number below WORLD_SIZE, as torchrun sets them, got "
            f"{os.environ['RANK']!r} and {os.environ['WORLD_SIZE']!r}"
        )
    return found


def size() -> int:
    """The number of processes that share what is run here; 1 within `alone`."""
    return 1 if _alone else whole()[1]


def rank() -> int:
    """The number of this process among them; 0 within `alone`."""
    return 0 if size() == 1 else whole()[0]


def prints() -> bool:
    """Whether this process is the one that prints: process 0, or the only one."""
    return whole()[0] == 0


def writes() -> bool:
    """Whether this process writes files: process 0 does, and within `alone` each its own."""
    return bool(_alone) or prints()


def whole() -> tuple[int, int]:
    """The number of this process and how many there are, within `alone` too."""
    if _group is None:
        return 0, 1
    import torch.distributed

    found = torch.distributed.get_rank(_group), torch.distributed.get_world_size(_group)
    return int(found[0]), int(found[1])


def local() -> tuple[int, int]:
    """The number of this process on its machine, and how many run there."""
    return _local


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Share the work inside the with block among the processes that were started with this one.

    Without a launcher's variables, or with one process, nothing changes. Where torch.distributed
    runs already, its processes are the ones.

    Raises:
        SimdiffError: the processes cannot be reached, or run different versions.
    """
    global _group, _failures, _local
    number, count = announced()
    if count == 1 or _group is not None:
        yield
        return
    import torch.distributed as distributed

    from simdiff.io.progress import silent  # here: commands that print help do not wait for it

    try:
        if not distributed.is_initialized():
            distributed.init_process_group(_backend(), timeout=_START)
            # Not at the end of the with block: a second one must not meet the first in others.
            atexit.register(_leave)
        _group = distributed.new_group(backend="gloo", timeout=_WAIT)
        _failures = distributed.new_group(backend="gloo", timeout=_TOGETHER)
    except (RuntimeError, ValueError) as error:
        raise SimdiffError(
            f"process {number} must reach the {count} that WORLD_SIZE announces at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: "
            f"{' '.join(str(error).split())}"
        ) from None
    try:
        with silent() if number else contextlib.nullcontext():
            agree("the processes", _versions())
            _local = _place()
            yield
    finally:
        mine, _group, _failures, _local = (_group, _failures), None, None, (0, 1)
        for group in mine:
            distributed.destroy_process_group(group)


def _place() -> tuple[int, int]:
    """This process's number on its machine and how many run there, as the launcher or names say."""
    here = platform.node()
    told = gather(here)
    before = sum(name == here for name in told[: rank()])
    number = int(os.environ.get("LOCAL_RANK", before))
    return number, int(os.environ.get("LOCAL_WORLD_SIZE", told.count(here)))


def _leave() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _backend() -> str:
    import torch
    import torch.distributed

    nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if nccl else "gloo"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"Python": platform.python_version()}
    for name in ("simdiff-kernels", "torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Share nothing inside the with block: this process does all of it."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def gather(value: Result) -> list[Result]:
    """The values of all processes, in their order.

    Raises:
        ElsewhereError: another process has ended.
    """
    count = size()
    if count == 1:
        return [value]
    import torch.distributed

    values: list[Any] = [None] * count
    try:
        torch.distributed.all_gather_object(values, value, group=_group)
    except RuntimeError:
        raise ElsewhereError(
            "another process has ended, or cannot be reached any more: its own words tell why"
        ) from None
    return values


def all_of(function: Callable[[], Result]) -> list[Result]:
    """What a function returns in each process, in their order; nothing is shared within it.

    Raises:
        Exception: what the function raised in the first process where it raised: there the same
            exception, in the others a SimdiffError or SurgeryError of the same text, or
            ElsewhereError for all others.
    """
    if size() == 1:
        return [function()]
    result, error = None, None
    try:
        with alone():
            result = function()
    except Exception as caught:
        error = caught
    return [value for value, _ in _without_errors(gather((result, _told(error))), error)]


def first(function: Callable[[], Result]) -> Result:
    """What a function returns in process 0, which runs it alone while the others wait.

    Raises:
        Exception: see `all_of`.
    """
    return all_of(function if rank() == 0 else lambda: None)[0]  # type: ignore[return-value]


def by_first(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate a function that process 0 runs for all of them, see `first`."""

    @functools.wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return first(lambda: function(*args, **kwargs))

    return wrapped


def entered_by_first(
    manager: Callable[Parameters, contextlib.AbstractContextManager[Result]],
) -> Callable[Parameters, contextlib.AbstractContextManager[Result]]:
    """Decorate a context manager that process 0 enters and leaves; all get what it yields."""

    @contextlib.contextmanager
    @functools.wraps(manager)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Iterator[Result]:
        with contextlib.ExitStack() as stack:
            yield first(lambda: stack.enter_context(manager(*args, **kwargs)))
            gather(None)  # all have come so far
            first(stack.close)

    return wrapped


def shared(
    function: Callable[[Item], Result], items: Sequence[Item], description: str | None = None
) -> list[Result]:
    """`[function(item) for item in items]`, each process taking a run of the items.

    Args:
        function: takes an item; nothing is shared within it.
        items: the same in all processes.
        description: text of a progress bar; None shows none.

    Raises:
        Exception: see `all_of`.
    """
    from simdiff.io.progress import track

    mine = [items[index] for index in part(len(items))]

    def run() -> list[Result]:
        return [function(item) for item in (track(mine, description) if description else mine)]

    return [result for results in all_of(run) for result in results]


def part(count: int) -> range:
    """The indices of the items that this process takes of `count`: a run, perhaps an empty one."""
    number, processes = rank(), size()
    return range(count * number // processes, count * (number + 1) // processes)


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """Refuse to go on where the processes do not have the same facts.

    Args:
        what: what the facts are of, for the message.
        facts: plain values by their names; within mappings, by names such as `text.seed`.

    Raises:
        SimdiffError: in all processes; names every fact that differs, with two of its values.
    """
    if size() == 1:
        return
    found = gather(dict(_flat(facts)))
    names = dict.fromkeys(name for one in found for name in one)
    differing = []
    for name in names:
        values = [one.get(name) for one in found]
        other = next((r for r, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            differing.append(
                f"{name} ({_short(values[0])} in process 0, {_short(values[other])} in process "
                f"{other})"
            )
    if differing:
        raise _shared(
            SimdiffError(
                f"{what} must be the same in all processes, got other {', '.join(differing)}"
            )
        )


def tells(error: BaseException) -> bool:
    """Whether this process is to print an error: process 0 does not, or has another one."""
    if _group is None:
        return True
    if isinstance(error, ElsewhereError) or getattr(error, "_simdiff_shared", False):
        return prints()
    import torch.distributed

    texts: list[Any] = [None] * whole()[1]
    try:
        torch.distributed.all_gather_object(texts, str(error), group=_failures)
    except RuntimeError:
        return True  # the others have not failed, or in another way
    return prints() or texts[0] != str(error)


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _short(value: Any) -> str:
    text = hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
    return text if len(text) <= 40 else f"{text[:16]}…"


def _told(error: Exception | None) -> tuple[str, str] | None:
    """An error as plain values: not every exception can be sent."""
    if error is None:
        return None
    kinds = [kind.__name__ for kind in (SurgeryError, SimdiffError) if isinstance(error, kind)]
    return (kinds[0], str(error)) if kinds else ("", f"{type(error).__name__}: {error}")


def _without_errors(
    found: list[tuple[Any, tuple[str, str] | None]], own: Exception | None
) -> list[tuple[Any, tuple[str, str] | None]]:
    for number, (_, told) in enumerate(found):
        if told is None:
            continue
        kind, text = told
        if own is not None and number == rank():
            raise _shared(own) if kind else own
        kinds = {"SimdiffError": SimdiffError, "SurgeryError": SurgeryError}
        raise _shared(
            kinds.get(kind, ElsewhereError)(text if kind else f"process {number}: {text}")
        )
    return found


def _shared(error: Exception) -> Exception:
    error._simdiff_shared = True  # type: ignore[attr-defined]
    return error
