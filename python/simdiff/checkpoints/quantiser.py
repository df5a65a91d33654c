"""Carry the module names and expressions of a quantisation config over to the cut model.

Such configs choose modules by literal names, regular expressions or wildcards
(`modules_to_not_convert`, `ignore`, the keys of `dynamic`). What counts is what an entry matches:
the entry that is written matches in the cut model the modules that stayed of those that the old
entry matched in the dense model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from simdiff.checkpoints.tensor_names import LayerNumbers
from simdiff.errors import SimdiffError

QUANTISER_ENTRIES = ("quantization_config", "compression_config", "quantization")
"""Entries of a config.json that describe how the weights are packed."""

_MARKS = ("re:", "+:", "-:")
"""Marks of regular expressions: compressed-tensors writes re:, GPTQ's dynamic +: and -:."""

_SPECIAL = re.compile(r"[*?\[\](){}|^$+\\]")
_WILDCARDS = ("modelopt", "quark", "nvfp4")
"""Quantisers whose unmarked expressions are wildcards, never regular expressions."""

_Matcher = Callable[[str], bool]


@dataclass(frozen=True)
class Modules:
    """The modules of a dense model by name, each with its name after the cut; None if it goes."""

    names: dict[str, str | None]
    layers: LayerNumbers

    @classmethod
    def of(cls, names: Iterable[str], layers: LayerNumbers) -> Modules:
        """The modules that own tensors.

        Args:
            names: names of tensors, those of the files and those of the stock model.
            layers: the new numbers of the layers.
        """
        owners = {name.rpartition(".")[0] for name in names} - {""}
        return cls({owner: layers.rename_any(owner) for owner in sorted(owners)}, layers)

    @property
    def after(self) -> list[str]:
        """The names of the modules of the cut model."""
        return [new for new in self.names.values() if new is not None]


def carry_over(content: Any, modules: Modules, where: str) -> Any:
    """Carry every string and key of a quantisation config over to the cut model.

    An entry stays as it is, or has its layer numbers changed, if it then matches the right modules
    in every way in which it can be read. Otherwise the modules are written out by name. An entry
    that matched modules of removed layers alone is dropped.

    Args:
        content: JSON values.
        modules: modules of the dense model.
        where: the file and entry, for messages.

    Raises:
        SimdiffError: an entry that can be read in several ways has no counterpart after the cut.
    """
    method = str(content.get("quant_method", "")) if isinstance(content, dict) else ""
    wildcards = any(name in f"{method} {where}" for name in (*_WILDCARDS, "hf_quant_config"))
    return _carried(content, modules, where, wildcards)


def _carried(content: Any, modules: Modules, where: str, wildcards: bool) -> Any:
    if isinstance(content, str):
        found = _entries(content, modules, where, wildcards)
        if len(found) == 1 or not found:
            return found[0] if found else None
        raise _refusal(content, where)
    if isinstance(content, dict):
        carried: dict[Any, Any] = {}
        for key, value in content.items():
            new = _carried(value, modules, f"{where}.{key}", wildcards)
            names = _entries(key, modules, where, wildcards) if isinstance(key, str) else [key]
            if new is not None or value is None:
                carried |= dict.fromkeys(names, new)
        return carried
    if isinstance(content, (list, tuple)):
        items: list[Any] = []
        for item in content:
            if isinstance(item, str):
                items += _entries(item, modules, where, wildcards)
            else:
                items.append(_carried(item, modules, where, wildcards))
        return type(content)(dict.fromkeys(items)) if _all_strings(items) else type(content)(items)
    return content


def _all_strings(items: Collection[Any]) -> bool:
    return all(isinstance(item, str) for item in items)


def _entries(text: str, modules: Modules, where: str, wildcards: bool) -> list[str]:
    """The entries that take the place of one: none, one, or the modules by name."""
    if text.isdecimal():
        return [text]
    readings = _readings(text, wildcards)
    before = [{name for name in modules.names if matches(name)} for matches in readings]
    wanted = [{new for name in found if (new := modules.names[name])} for found in before]
    if not any(before):
        # The entry names what has no tensors, or is in another dialect of names.
        new = renumber_by_spelling(text, modules.layers, where)
        return [] if new is None else [new]
    if not any(wanted):
        return []
    after = modules.after
    for candidate in _candidates(text, modules.layers):
        found = [{name for name in after if m(name)} for m in _readings(candidate, wildcards)]
        if found == wanted:
            return [candidate]
    chosen = {frozenset(names) for names, old in zip(wanted, before, strict=True) if old}
    if len(chosen) != 1:
        raise _refusal(text, where)
    names = sorted(chosen.pop())
    mark = next((mark for mark in _MARKS if text.startswith(mark)), None)
    if mark in ("+:", "-:"):
        return [f"{mark}(?:{'|'.join(map(re.escape, names))})$"]
    return names


def _candidates(text: str, layers: LayerNumbers) -> Iterable[str]:
    yield text
    try:
        new = renumber_by_spelling(text, layers, "")
    except SimdiffError:
        return
    if new is not None:
        yield new


def _readings(text: str, wildcards: bool) -> list[_Matcher]:
    """The ways in which loaders may read an entry, as tests of a module's name."""
    mark = next((mark for mark in _MARKS if text.startswith(mark)), "")
    if not mark and not _SPECIAL.search(text):
        part = f".{text.strip('.')}."
        return [lambda name: part in f".{name}."]
    readings: list[_Matcher] = []
    if not mark:
        readings.append(lambda name: any(fnmatchcase(part, text) for part in _with_parents(name)))
    if not (wildcards and not mark):
        # Like transformers: an unmarked expression ends where a part of the name ends.
        end = "" if mark else r"(?:(?<=\.)|(?=\.|$))"
        try:
            compiled = re.compile(f"(?:{text.removeprefix(mark)}){end}")
        except re.error:
            compiled = None
        if compiled is not None:
            found = compiled
            readings.append(lambda name: found.match(name) is not None)
    return readings


def _with_parents(name: str) -> Iterable[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _refusal(text: str, where: str) -> SimdiffError:
    return SimdiffError(
        f"{where}: {text!r} chooses layers by an expression that cannot be carried over to the cut "
        "model: list the layers by name, or as (1|2|3), in the checkpoint's config first"
    )


def renumber_by_spelling(text: str, layers: LayerNumbers, where: str) -> str | None:
    """Change the layer numbers in one name or expression; None if its layers are all removed.

    Raises:
        SimdiffError: the expression chooses layers in a way that is not understood.
    """
    last = re.escape(layers.prefix.rpartition(".")[2])
    match = re.search(rf"(?<![A-Za-z0-9_]){last}(?P<dot>\\?\.)(?P<number>.*)", text, re.DOTALL)
    before = text[: match.start()] + last if match else ""
    if match is None or _names_another(before, layers):
        return text
    number, head = match["number"], text[: match.start("number")]
    one = re.match(r"(\d+)(?=\\?\.|\$|$)", number)
    if one:
        new = layers.new.get(int(one[1]))
        return None if new is None else f"{head}{new}{number[one.end() :]}"
    several = re.match(r"\((\?:)?((?:\d+\|)*\d+)\)(?=\\?\.|\$|$)", number)
    if several:
        kept = [layers.new[int(n)] for n in several[2].split("|") if int(n) in layers.new]
        if not kept:
            return None
        group = f"({several[1] or ''}{'|'.join(map(str, kept))})"
        return f"{head}{group}{number[several.end() :]}"
    every = re.match(r"\(?(?:\\d|\[0-9\]|\.)?[*+]|\[\^", number)
    if every or not re.match(r"[\d(\[]", number):
        return text
    raise _refusal(text, where)


def _names_another(before: str, layers: LayerNumbers) -> bool:
    """Whether the prefix of a name counts other things, such as layers of a vision tower."""
    plain = before.replace("\\", "").removeprefix("re:").lstrip("^.*")
    return any(plain == other or plain.endswith(f".{other}") for other in layers.others)
