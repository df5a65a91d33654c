"""The names of criteria and selections, and the defaults of a plan. No torch: `--help` reads it."""

from __future__ import annotations

CRITERIA = (
    "simdiff",
    "simdiff-mssd",
    "simdiff-masd",
    "simdiff-max",
    "block-influence",
    "relative-magnitude",
    "norm-ratio",
    "last-n",
    "random",
    "cosine-block",
    "angular-block",
    "angular-block-last",
)
"""Criteria of scores alone; `simdiff.planning.criteria.CRITERIA` says what each of them is."""

WEIGHED = ("simdiff-mssd", "simdiff-masd", "simdiff-max")
"""Criteria that weigh difference against similarity by alpha."""

_SWEPT = "-swept"
SWEPT = {name + _SWEPT: name for name in WEIGHED}
"""Criteria that try every alpha by perplexity, and the criterion whose alpha that is."""

ONE_SHOT = "one-shot-perplexity"
GREEDY = "greedy-perplexity"
SEARCHES = (ONE_SHOT, GREEDY)

SEARCHED = (*SWEPT, *SEARCHES)
"""Criteria that evaluate the model without layers."""

ALL_CRITERIA = (*CRITERIA, *SEARCHED)

SELECTIONS = ("lowest", "contiguous", "blocks")

SUBLAYER_UNITS = ("attention", "mlp", "sublayer")
UNITS = ("layer", *SUBLAYER_UNITS)
"""What a plan removes: whole layers, or sub-layers of a kind, or of both kinds."""

DEFAULT_CRITERION = "simdiff"
DEFAULT_ALPHA = 0.5
# The standard error of a share of 0.95 is then 0.01.
NUM_RESAMPLES = 500
