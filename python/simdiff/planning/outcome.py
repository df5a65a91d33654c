"""What a plan reaches: layers, parameters, bytes, and the predicted speed of decoding."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from simdiff.planning.budget import BYTES_OF

_ASKED = {
    "num_layers": "{:d} layers to go",
    "ratio": "a share of {:g} of the layers to go",
    "parameter_ratio": "a share of {:g} of the parameters to go",
    "speed_up": "decoding {:g} times faster",
    "max_memory": "weights of at most {:g} GB",
}


def outcome(model: Mapping[str, Any], removed: Collection[int]) -> dict[str, Any] | None:
    """The sizes before and after, and how much faster decoding gets at batch size 1.

    The time of a token is taken to be proportional to the bytes of the weights that it reads, as in
    `simdiff.planning.budget.Budget.layers`.

    Args:
        model: identity of the dense model, see `simdiff.models.identity.model_identity`.
        removed: the layers that go.

    Returns:
        None where the sizes of the layers are not known.
    """
    if "layer_parameters" not in model:
        return None
    total = int(model["num_parameters"])
    gone = sum(model["layer_parameters"][layer] for layer in removed)
    read = total - int(model["embedding_parameters"])
    width = BYTES_OF.get(str(model.get("dtype")))
    return {
        "num_layers": [int(model["num_layers"]), int(model["num_layers"]) - len(removed)],
        "num_parameters": [total, total - gone],
        "num_bytes": None if width is None else [width * total, width * (total - gone)],
        "decode_times_faster": read / (read - gone),
    }


def in_dtype(found: Mapping[str, Any] | None, dtype: str) -> dict[str, Any] | None:
    """The outcome of a cut whose weights are stored in another dtype than the dense model's."""
    if found is None or not found["num_bytes"] or dtype not in BYTES_OF:
        return None if found is None else dict(found)
    before, (_, after) = found["num_bytes"][0], found["num_parameters"]
    narrower = before / found["num_parameters"][0] / BYTES_OF[dtype]
    return {
        **found,
        "num_bytes": [before, BYTES_OF[dtype] * after],
        "decode_times_faster": found["decode_times_faster"] * narrower,
    }


def outcome_line(found: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> str | None:
    """The outcome of a plan, and what was asked for, in one line; None if it is not known."""
    if found is None:
        return None
    (depth, kept), parameters = found["num_layers"], found["num_parameters"]
    parts = [
        f"{_pair(parameters)} parameters ({parameters[1] / parameters[0] - 1:+.0%})",
        f"{_pair(found['num_bytes'])}B" if found["num_bytes"] else "",
        f"decoding about {found['decode_times_faster']:.2f} times as fast, by the bytes it reads",
    ]
    wish = ", ".join(_ASKED[name].format(value) for name, value in asked.items())
    return f"{kept} of {depth} layers stay: {', '.join(filter(None, parts))}" + (
        f"; asked for: {wish}" if wish else ""
    )


def _pair(sizes: list[int]) -> str:
    """Two sizes in the unit that suits the first."""
    units = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
    scale, unit = next((scale, unit) for scale, unit in units if sizes[0] >= scale)
    return " → ".join(f"{size / scale:.1f}" for size in sizes) + f" {unit}"
