"""The names of criteria and selections, and the defaults of a plan. No torch: `--help` reads it."""

from __future__ import annotations

from dataclasses import dataclass

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

ABOUT = {
    "simdiff": "squared error of a cut by the norms, blocks chosen together; may read the model",
    "simdiff-mssd": "the paper's: cosine distance and mean squared difference (MSSD), by alpha",
    "simdiff-masd": "the paper's: cosine distance and mean absolute difference (MASD), by alpha",
    "simdiff-max": "as simdiff-mssd, with the largest token in place of the mean",
    "block-influence": "cosine distance of the states before and after a layer (ShortGPT)",
    "relative-magnitude": "length of the difference by the length of the state before",
    "norm-ratio": "how much a layer changes the length of the state",
    "last-n": "the deepest layers go first",
    "random": "a baseline: layers drawn by --random-seed",
    "cosine-block": "one block of least cosine distance (LLM-Streamline)",
    "angular-block": "one block of least angle, of all tokens (Gromov et al.)",
    "angular-block-last": "one block of least angle, of the last tokens (Gromov et al.)",
    "simdiff-mssd-swept": "simdiff-mssd at the best alpha by perplexity; runs the model",
    "simdiff-masd-swept": "simdiff-masd at the best alpha by perplexity; runs the model",
    "simdiff-max-swept": "simdiff-max at the best alpha by perplexity; runs the model",
    "one-shot-perplexity": "loss of the model without each layer alone; runs the model",
    "greedy-perplexity": "the same, one layer after the other; runs the model, takes longest",
}
"""Each criterion in a line of help."""

SELECTIONS = ("lowest", "contiguous", "blocks")

SUBLAYER_UNITS = ("attention", "mlp", "sublayer")
UNITS = ("layer", *SUBLAYER_UNITS)
"""What a plan removes: whole layers, or sub-layers of a kind, or of both kinds."""

DEFAULT_CRITERION = "simdiff"
DEFAULT_ALPHA = 0.5
# The standard error of a share of 0.95 is then 0.01.
NUM_RESAMPLES = 500


@dataclass(frozen=True)
class Effort:
    """How much a search may cost, and how wide it searches."""

    share: float
    """Of the cost of greedy search, the calibration pass included."""
    width: int
    """Number of candidates that a step reads."""
    beam: int
    """Number of plans from which a step begins."""
    windows: int
    """Most windows that a plan reads."""
    early: int
    """Most windows that it reads before the last choice."""
    finalists: int
    """Number of plans among which the last race chooses."""
    exchanges: bool = True
    """Whether single layers are exchanged at the end."""


EFFORTS = {
    "none": None,
    "quick": None,
    "normal": Effort(1 / 5, width=5, beam=1, windows=8, early=2, finalists=6),
    "thorough": Effort(1.0, width=8, beam=3, windows=16, early=4, finalists=12),
}
"""What `simdiff` spends on its plan: nothing beside the scores; a few reads, see
`simdiff.planning.exchange`; or a search, see `simdiff.planning.effort_search`."""

DEFAULT_EFFORT = "normal"
STREAMED_EFFORT = "quick"
"""The default for a streamed model, which a search would read some tens of times."""
