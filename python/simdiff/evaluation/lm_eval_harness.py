"""The model class of lm_eval as the toolkit runs it: our bars and processes, nothing printed."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from simdiff.evaluation.answers import bounded
from simdiff.io import ranks
from simdiff.io.progress import track


def harness_class(description: str, max_new_tokens: int | None) -> Any:
    """Make lm_eval's model class with our progress bar, its data parallelism by our processes."""
    import torch
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self._rank, self._world_size = ranks.rank(), ranks.size()

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            # lm_eval gathers how many requests each process has, to fill all up to the most, which
            # only models that are themselves divided among processes need.
            return tensor.reshape(1).repeat(self.world_size)

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
            found = ranks.gather(obj)
            return found if self.rank == dst else None

        def barrier(self) -> None:
            ranks.gather(None)

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
            with counted(self, len(requests), description):
                return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
            bounded(requests, max_new_tokens)
            with counted(self, len(requests), f"{description}, answers"):
                return super().generate_until(requests, disable_tqdm=True)

    return Harness


class _Advance:
    """A cache for lm_eval that only counts the finished requests it is told of."""

    def __init__(self, bar: Iterator[int]) -> None:
        self.bar = bar

    def add_partial(self, attr: str, request: object, result: object) -> None:
        next(self.bar, None)


@contextlib.contextmanager
def counted(harness: Any, total: int, description: str) -> Iterator[None]:
    """A bar of the requests that a harness answers inside the with block."""
    before = harness.cache_hook
    bar = track(range(total), description)
    harness.set_cache_hook(_Advance(bar))
    next(bar, None)  # it shows at once, and its time is that of the first request too
    try:
        yield
        for _ in bar:  # counts the requests that lm_eval does not report
            pass
    finally:
        harness.set_cache_hook(before)


@contextlib.contextmanager
def quiet(offline: bool) -> Iterator[None]:
    """Hide what libraries print and warn; block the network if data are local."""
    import datasets
    from lm_eval.api import task as lm_eval_task

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.utils.logging.is_progress_bar_enabled()
    with contextlib.ExitStack() as stack:
        if offline:  # set here: `datasets` reads the environment only when it is imported
            for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
                stack.enter_context(replaced(datasets.config, name, True))
        stack.enter_context(replaced(lm_eval_task, "tqdm", lambda items, **_: items))
        # Standard output is for results; lm_eval tells there that it bootstraps.
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            logger.setLevel(level)
            if bars:
                datasets.enable_progress_bars()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """An attribute has another value inside the with block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
