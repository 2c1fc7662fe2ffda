"""Many sites as few lines: equal decisions of repeated layers and heads are shown once."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from fxopt.ir.units import SHOWN

Item = TypeVar("Item")
# A number that counts modules, heads or calls: a whole component of a site's key.
_INDEX = re.compile(r"(?<=[./=#])\d+(?=[./#]|$)|^\d+(?=[./#]|$)")
# A number of its own in a sentence, not one inside a name, with its unit of time or size.
_FACTORS = dict(unit for units in SHOWN.values() for unit in units)
QUANTITY = re.compile(
    r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\d.]*\w*[._]\w)(?!\d)"
    rf"(?: (?:{'|'.join(_FACTORS)})\b)?"
)


def groups(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Items with equal keys together, in the order of their first."""
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def fold_keys(keys: Iterable[str]) -> list[str]:
    """`a.0.b`, `a.1.b`, `a.3.b` as `a.{0..1,3}.b`; indices fold only where all below is equal."""
    shapes = groups(keys, lambda key: _INDEX.sub("\0", key))
    folded: list[str] = []
    for shape in shapes:
        parts = _INDEX.sub("\0", shape[0]).split("\0")
        indices = sorted({tuple(map(int, _INDEX.findall(key))) for key in shape})
        for found in _fold(indices):
            folded.append(
                "".join(part + index for part, index in zip(parts, [*found, ""], strict=True))
            )
    return folded


def _fold(indices: Sequence[tuple[int, ...]]) -> list[tuple[str, ...]]:
    if not indices or not indices[0]:
        return [()] if indices else []
    below = {
        first: tuple(_fold([index[1:] for index in indices if index[0] == first]))
        for first in dict.fromkeys(index[0] for index in indices)
    }
    return [
        (_ranges(firsts), *rest)
        for firsts in groups(below, below.__getitem__)
        for rest in below[firsts[0]]
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """`3`, `{0..5}` or `{0..2,7}` for sorted numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    if len(numbers) == 1:
        return str(numbers[0])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return "{" + ",".join(texts) + "}"


def sentence_shape(text: str) -> str:
    """A sentence without its numbers: what makes two reasons the same reason."""
    return QUANTITY.sub("\0", text)


def merge_sentences(texts: Sequence[str]) -> str:
    """Sentences of one shape as one: quantities that differ become `least..largest`."""
    columns = zip(*(QUANTITY.findall(text) for text in texts), strict=True)
    spans = [_span(sorted(set(column), key=_size)) for column in columns]
    parts = sentence_shape(texts[0]).split("\0")
    return "".join(part + span for part, span in zip(parts, [*spans, ""], strict=True))


def _size(quantity: str) -> float:
    number, _, unit = quantity.partition(" ")
    return float(number) * _FACTORS.get(unit, 1.0)


def _span(quantities: Sequence[str]) -> str:
    """`3`, `64..192 KiB` or `64 KiB..1.2 MiB` for sorted quantities."""
    least, largest = quantities[0], quantities[-1]
    if len(quantities) == 1:
        return least
    number, _, unit = least.partition(" ")
    return f"{number if unit == largest.partition(' ')[2] else least}..{largest}"
