"""Calls into other libraries: what they raise becomes one sentence, what they log is not shown."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging

from simdiff.errors import SimdiffError
from simdiff.io import progress

_LONGEST = 160
"""Characters of a library's message that are repeated; lists of all model types are longer."""

_KNOWN = (
    (
        r"MemoryError|out of memory|can't allocate memory|not enough memory",
        "there is not enough memory for it: give dtype='bfloat16', another device, or "
        "device='auto', which spreads it over all GPUs",
    ),
    (
        r"flash.?att",
        "config.json asks for flash attention, which cannot run here: remove attn_implementation "
        "from config.json, or install the package flash_attn",
    ),
    (
        r"trust_remote_code|custom code",
        "it asks for code of its own, which simdiff never runs: take a version of it that stock "
        "transformers loads",
    ),
    (
        r"SafetensorError|header too|IncompleteBuffer|invalid load key|PytorchStreamReader",
        "a weight file is damaged or not whole: copy or download it again",
    ),
    (
        r"upgrade torch to at least v2\.6|weights_only",
        "its weights are pickles that cannot be read safely: take a version in safetensors",
    ),
)
"""What a message contains, and what a user is told instead of it."""


@contextlib.contextmanager
def foreign(doing: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a library raises inside the with block into one sentence.

    Args:
        doing: what was tried, the beginning of the message.
        advice: what to do about it, where the library's message does not tell.

    Raises:
        SimdiffError: in place of any other error.
    """
    try:
        yield
    except SimdiffError:
        raise
    except Exception as error:  # libraries raise anything, also bare KeyErrors
        raise SimdiffError(f"{doing}: {in_one_line(error, advice)}") from error


def in_one_line(error: Exception, advice: str = "") -> str:
    """What went wrong and what to do, from an error of a library."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    for pattern, known in _KNOWN:
        if re.search(pattern, f"{kind} {text}", re.IGNORECASE):
            return known
    if len(text) > _LONGEST:
        text = text[: text.rfind(" ", 0, _LONGEST)] + " …"
    said = text if isinstance(error, (ImportError, OSError)) and text else f"{kind}: {text}"
    return f"{said}; {advice}" if advice else said


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Show neither warnings nor progress bars of transformers inside the with block.

    With `progress.talkative` everything is shown.
    """
    if progress.verbose:
        yield
        return
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(before)
