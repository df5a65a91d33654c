"""Records of weights, of a model loaded whole and of the same one streamed."""

from __future__ import annotations

from typing import Any


def of_files(content: Any) -> Any:
    """Content without the digests of weights in memory, which a streamed model has none of."""
    if isinstance(content, list):
        return [of_files(value) for value in content]
    if not isinstance(content, dict):
        return content
    kept = {key: of_files(value) for key, value in content.items()}
    for name in ("weights", "cut_from_weights"):
        if isinstance(kept.get(name), dict):
            kept[name].pop("memory", None)
    return kept
