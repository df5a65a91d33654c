"""TextOptions: the text that a job reads, cut into calibration and held-out windows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from simdiff.data.text import Text, TokenWindows, token_windows


@dataclass(frozen=True)
class TextOptions:
    """The text that a job reads, and how much of it."""

    source: Text
    num_windows: int = 32
    window_length: int = 512
    seed: int = 0

    def windows(self, tokenizer: PreTrainedTokenizerBase, part: str) -> TokenWindows:
        """Token windows of one part of the text."""
        return token_windows(
            self.source,
            tokenizer,
            part=part,
            num_windows=self.num_windows,
            window_length=self.window_length,
            seed=self.seed,
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
    return replace(text, source=source).windows(tokenizer, "all")
