"""Search for config values from which stock classes build the kept layers.

Some entries select layers by position (every second layer has experts, the first three are dense)
and would select other layers after a cut. The search tries values that could select the same layers
again and lets the stock class decide.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from simdiff.models.config import MTP, is_int, layer_counts, text_part
from simdiff.models.layer_indices import spans
from simdiff.surgery.config_entries import (
    LAYERISH,
    Depth,
    cut_entries,
    depth_of,
    is_index_list,
)
from simdiff.surgery.dependencies import lost_attention, lost_by_sharing
from simdiff.surgery.structure import (
    INDEX_NAME,
    Difference,
    Structure,
    StructureComparison,
    build,
    build_cut,
    compare_structures,
    describe,
)

POSITION = re.compile(
    r"layer|block|first|last|dense|sparse|moe|step|freq|interval|period|pattern|offset|every|stride"
)
"""Names of numbers that may tell layers apart by position."""

PER_LAYER = re.compile(r"layer|block|pattern|types|ratios|idx|ind(ex|ices)")
"""Names of lists that are cut even if the class does not read them, since other loaders may."""

STEP = re.compile(r"step|freq|interval|period|pattern|every|stride")
"""Names of numbers n that mean every n-th layer."""

SCALE = re.compile(r"scale|multiplier|factor|alpha|depth")
"""Names of numbers that a class may divide by the depth, like MiniCPM's scale_depth."""

Edit = dict[tuple[str, ...], Any]
"""New values by the path of their entry."""


class Trial:
    """Compares the models that stock classes build from trial configs with the dense model."""

    def __init__(
        self,
        model_class: type[PreTrainedModel],
        config: PreTrainedConfig,
        kept: Sequence[int],
        dense: Structure | None = None,
    ) -> None:
        """Build the dense model, unless its structure is known."""
        self.model_class = model_class
        self.config = config
        self.dense = dense or describe(build(model_class, config))
        self.depth = depth_of(config, kept)
        text = text_part(config)
        self.lost = (*lost_by_sharing(text, self.depth), *lost_attention(text, self.depth))

    def compare(self, cut: PreTrainedConfig) -> StructureComparison:
        """Build the model of a cut config and compare it with the dense model."""
        return self.compare_model(build_cut(self.model_class, cut))

    def compare_model(self, stock: PreTrainedModel | Difference) -> StructureComparison:
        """Compare the result of `build_cut` with the dense model."""
        if isinstance(stock, Difference):
            return StructureComparison((*self.lost, stock), (), ())
        compared = compare_structures(self.dense, describe(stock), self.depth.kept)
        return replace(compared, differences=(*self.lost, *compared.differences))

    def cost(self, cut: PreTrainedConfig) -> float:
        """The number of differences from the dense model; infinite if the class refuses `cut`."""
        stock = build_cut(self.model_class, cut)
        if isinstance(stock, Difference):
            return math.inf
        return len(self.compare_model(stock).differences)


def search_config(trial: Trial, seconds: float = 60.0) -> PreTrainedConfig:
    """Find the cut config with the fewest differences, changing one entry or pair at a time.

    Args:
        trial: the cut and its dense model.
        seconds: time limit; the best config found by then is returned.
    """
    deadline = time.monotonic() + seconds
    best = cut_entries(trial.config, trial.depth)
    cost = trial.cost(best)
    least = len(trial.lost)  # differences that no value of an entry can remove
    # `best` has the lowest cost so far. Each round tries every edit on top of the current best, so
    # that entries which only work together are found one after the other; a round that improves
    # nothing ends the search.
    while cost > least:
        improved = False
        for edit in _edits(trial):
            if time.monotonic() > deadline:
                return best
            attempt = _edited(best, edit)
            if attempt is not None and (attempt_cost := trial.cost(attempt)) < cost:
                best, cost, improved = attempt, attempt_cost, True
                if cost == least:
                    break
        if not improved:
            break
    return _with_coincidences(trial, best, cost)


def _with_coincidences(trial: Trial, cut: PreTrainedConfig, cost: float) -> PreTrainedConfig:
    """Restore lists that have one entry per layer only by coincidence (end-of-text tokens, say).

    A list is restored if its name does not suggest entries per layer and the stock class builds
    the same model from the uncut list.
    """
    after = dict(_entries(vars(text_part(cut))))
    for path, value in _entries(vars(text_part(trial.config))):
        named = any(PER_LAYER.search(name) for name in path)
        if isinstance(value, (list, tuple)) and not named and after.get(path) != value:
            attempt = _edited(cut, {path: value})
            if attempt is not None and trial.cost(attempt) <= cost:
                cut = attempt
    return cut


def _edited(config: PreTrainedConfig, edit: Edit) -> PreTrainedConfig | None:
    new = copy.deepcopy(config)
    changed = False
    for path, value in edit.items():
        entries = vars(text_part(new))
        for name in path[:-1]:
            entries = entries[name]
        changed |= entries.get(path[-1]) != value
        entries[path[-1]] = value
    return new if changed else None


def _edits(trial: Trial) -> Iterator[Edit]:
    """Yield possible new values of entries, or of pairs of entries, the most likely first."""
    depth, num_kept = trial.depth, len(trial.depth.kept)
    entries = dict(_entries(vars(text_part(trial.config))))
    groups = _groups(trial.dense, depth)
    counts = layer_counts(text_part(trial.config))
    numbers = {
        path: value
        for path, value in entries.items()
        if path[-1] not in counts
        and is_int(value)
        and POSITION.search(path[-1])
        and 0 <= value <= 2 * depth.num_layers
    }
    # A number n may count the first n layers, the last n, or be the index of a layer: its new value
    # is the number of kept layers below n, those among the last n, or the new index of layer n. It
    # may also be unrelated to layers and stay as it was.
    for path, value in numbers.items():
        for new in dict.fromkeys(
            (
                depth.below(value),
                num_kept - depth.below(depth.num_layers - value),
                depth.below(value + 1) - 1,
                value,
            )
        ):
            yield {path: new}
    for path, value in entries.items():
        if isinstance(value, float) and SCALE.search(path[-1]):
            yield from ({path: new} for new in _rescaled(value, num_kept / depth.num_layers))
        if isinstance(value, (list, tuple, str, dict)) and value:
            yield from _other_readings(path, value, depth)
    # `groups` are the sets of kept layers that have to be told apart, by new index. A step (every
    # n-th layer) can select a group that is an arithmetic progression, with an offset entry where
    # there is one; several classes also accept a list with one 0 or 1 per layer in its place.
    steps = [path for path in numbers if STEP.search(path[-1])]
    for path in steps:
        for group in groups:
            for step, offset in _progressions(group, num_kept):
                yield {path: step}
                for sibling in numbers:
                    if "offset" in sibling[-1]:
                        yield {path: step, sibling: offset}
            yield {path: [int(index in group) for index in range(num_kept)]}
    # A list of layer indices, even one that is empty or None so far, can name a group outright.
    # Where a step decides too (Qwen's mlp_only_layers and decoder_sparse_step), it is set to 1, so
    # that the list alone decides.
    lists = [
        path
        for path, value in entries.items()
        if LAYERISH.search(path[-1])
        and (not value or (isinstance(value, (list, tuple)) and all(map(is_int, value))))
        and (value is None or isinstance(value, (list, tuple)))
    ]
    for path, group in itertools.product(lists, groups):
        yield {path: group}
        yield from ({path: group, step: 1} for step in steps)


def _entries(
    entries: dict[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in entries.items():
        if isinstance(name, str) and not name.startswith("_") and not MTP.search(name):
            if isinstance(value, dict):
                yield from _entries(value, (*path, name))
            yield (*path, name), value


def _rescaled(value: float, share: float) -> Iterator[float]:
    """Yield values that keep value / depth, value / sqrt(depth) or the inverse ratios constant."""
    for new in (value * math.sqrt(share), value * share, value / math.sqrt(share), value / share):
        yield new
        yield math.nextafter(new, math.inf)  # the quotient must be equal to the last bit
        yield math.nextafter(new, -math.inf)


def _other_readings(path: tuple[str, ...], value: Any, depth: Depth) -> Iterator[Edit]:
    """Yield a list unchanged, cut, and renumbered from 0 and from 1.

    The first guess may be wrong where the length or the name of a list misleads.
    """
    # A list of layer indices is not tried unchanged: the check could not see that the indices mean
    # other layers now.
    if not is_index_list(path[-1], value, depth.num_layers):
        yield {path: value}
    if isinstance(value, (list, tuple)):
        if len(value) >= depth.num_layers:
            yield {path: type(value)(depth.cut(value))}
        elif not all(map(is_int, value)):  # a pattern that the class repeats along the depth
            unrolled = [value[layer % len(value)] for layer in depth.kept]
            yield {path: type(value)(unrolled)}
        if all(map(is_int, value)):
            yield {path: type(value)(depth.renumber(value))}
            yield {path: type(value)(depth.renumber(value, base=1))}


def signatures(dense: Structure) -> list[dict[str, str]]:
    """Describe each layer by its child modules, without the layer's own index."""
    result = []
    for states in dense.layers:
        children: dict[str, list[Any]] = {}
        for name, state in states.items():
            plain = sorted(
                (key, repr(value)) for key, value in state.items() if not INDEX_NAME.match(key)
            )
            children.setdefault(name.split(".")[0], []).append((name, plain))
        result.append({child: repr(content) for child, content in children.items()})
    return result


def _groups(dense: Structure, depth: Depth) -> list[list[int]]:
    """Sets of kept layers that share a variant of some child module, as indices after the cut."""
    layers = signatures(dense)
    groups: dict[tuple[int, ...], None] = {}
    for child in sorted({child for layer in layers for child in layer}):
        kinds = {layer.get(child) for layer in layers}
        if 1 < len(kinds) < depth.num_layers:
            for kind in sorted(kinds, key=str):
                members = (i for i, old in enumerate(depth.kept) if layers[old].get(child) == kind)
                groups[tuple(members)] = None
    return [list(group) for group in groups]


def _progressions(group: Sequence[int], num_kept: int) -> Iterator[tuple[int, int]]:
    """Yield (step, offset) for which i % step == offset selects exactly the layers of the group."""
    if not group:
        yield num_kept + 1, num_kept
    elif len(group) == 1:
        yield num_kept, group[0]
        yield group[0] + 1, group[0]
    elif len({high - low for low, high in itertools.pairwise(group)}) == 1:
        yield group[1] - group[0], group[0]


def alternatives(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    dense: Structure,
    num_removed: int,
    seconds: float = 20.0,
) -> str:
    """Name cuts that the model allows, in words; each was tried and proven."""
    deadline = time.monotonic() + seconds
    num_layers = len(dense.layers)

    def works(removed: Sequence[int]) -> bool:
        left = deadline - time.monotonic()
        if left < 0 or len(removed) >= num_layers:
            return False
        kept = [layer for layer in range(num_layers) if layer not in removed]
        trial = Trial(model_class, config, kept, dense)
        return not trial.lost and trial.cost(search_config(trial, left / 4)) == 0

    found = []
    last = range(num_layers - num_removed, num_layers)
    if num_removed > 1 and works(last):
        found.append(f"the last {num_removed} ({spans(last)})")
    kinds = [repr(sorted(layer.items())) for layer in signatures(dense)]
    periods = (p for p in range(2, num_layers // 2 + 1) if kinds[p:] == kinds[:-p])
    period = next(periods, None)
    if period and works(range(num_layers - period, num_layers)) and works(range(period)):
        found.append(f"any {period} in a row (0-{period - 1}, 1-{period}, ...)")
    singles = [layer for layer in range(num_layers - 1, -1, -1) if works([layer])]
    if len(singles) > 1 or (singles and num_removed == 1):
        found.append(f"{'one of ' if len(singles) > 1 else ''}{spans(sorted(singles))}")
    return " or ".join(found) or "none was found"
