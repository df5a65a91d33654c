"""TextOptions: the text that a job reads, cut into calibration and held-out windows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from simdiff.data.documents import Text, TextFile, check_text, source_name, with_column
from simdiff.data.text import TokenWindows, token_windows
from simdiff.errors import number_of
from simdiff.io.progress import tell


@dataclass(frozen=True)
class TextOptions:
    """The text that a job reads, and how much of it."""

    source: Text
    num_windows: int = 32
    window_length: int = 512
    seed: int = 0

    def check(self, held_out_source: Text | None = None) -> None:
        """Refuse a text, or another one to evaluate on, that cannot be read: before a model is.

        Raises:
            SimdiffError: see `simdiff.data.documents.read_documents`.
        """
        check_text(self.source)
        if held_out_source is not None:
            check_text(self.beside(held_out_source))

    def beside(self, source: Text) -> Text:
        """Another text, with the column of this one where a path alone is given."""
        if isinstance(source, (str, Path)) and isinstance(self.source, TextFile):
            return with_column(str(source), self.source.column)
        return source

    def windows(self, tokenizer: PreTrainedTokenizerBase, part: str) -> TokenWindows:
        """Token windows of one part of the text; says so where it fills fewer than are wanted."""
        found = token_windows(
            self.source,
            tokenizer,
            part=part,
            num_windows=self.num_windows,
            window_length=self.window_length,
            seed=self.seed,
        )
        tell_fewer(self.source, part, found.identity.num_windows, self.num_windows)
        return found


def tell_fewer(source: Text, part: str, found: int, wanted: int) -> None:
    """Say on standard error that a text has fewer windows than were asked for."""
    if found < wanted:
        what = "all" if part == "all" else f"the {part} half"
        tell(
            f"Note: {what} of {source_name(source)} fills {number_of(found, 'window')}, and "
            f"{wanted} were asked for"
        )


def both_parts(
    text: TextOptions, tokenizer: PreTrainedTokenizerBase, held_out_source: Text | None
) -> tuple[TokenWindows, TokenWindows]:
    """Calibration windows, and held-out windows from the other half or from another text."""
    calibration = text.windows(tokenizer, "calibration")
    return calibration, held_out_windows(text, tokenizer, held_out_source)


def held_out_windows(
    text: TextOptions, tokenizer: PreTrainedTokenizerBase, source: Text | None
) -> TokenWindows:
    """Windows of the held-out half of the calibration text, or of another text as a whole."""
    if source is None:
        return text.windows(tokenizer, "held-out")
    return replace(text, source=text.beside(source)).windows(tokenizer, "all")
