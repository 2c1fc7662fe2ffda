"""What an attention mask is, found by computing it at several lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from .evaluate import Sizes, Unknown, ancestors, evaluate, reads_inputs, runs_on, shape_at
from .names import attribute
from .shapes import free_symbols

# A window shows only beyond its own width, so lengths also pass every constant that is read.
LENGTHS = (5, 12, 33)
LONGEST = 8192
HIDDEN = -1e4


@dataclass(frozen=True)
class Meaning:
    """A mask in terms of `attend`: `padding` is a [batch, keys] node, nonzero where visible.

    `inverted` padding is nonzero where hidden.
    """

    causal: bool = False
    window: int = 0
    padding: fx.Node | None = None
    inverted: bool = False


def meaning(graph: fx.GraphModule, mask: fx.Node, sizes: Sizes, hides: bool) -> Meaning | None:
    """What `mask` [..., queries, keys] means; None when it is none of causal, window, padding.

    `mask` is boolean, or additive with 0 where visible. `hides`: true means hidden. `sizes` gives
    each symbol some size.
    """
    try:
        trials = list(_trials(graph, mask, sizes))
        if not reads_inputs(mask):
            return _same([_shown(evaluate(graph, mask, s), hides) for s in trials])
        for cut in _cuts(mask):
            for inverted in (False, True):
                found = _padded(graph, mask, trials, hides, cut, inverted)
                if found is not None:
                    return found
    except (Unknown, RuntimeError, IndexError):
        return None
    return None


def _trials(graph: fx.GraphModule, mask: fx.Node, sizes: Sizes) -> Iterator[Sizes]:
    """Sizes to try: the lengths of the mask vary, if they may."""
    free = list(dict.fromkeys(n for s in mask.meta["val"].shape[-2:] for n in free_symbols(s)))
    if not free:
        yield sizes
        return
    limits = [c + 2 for c in _constants(graph, mask)]
    if any(limit > LONGEST for limit in limits):
        raise Unknown("a constant too large to try")
    for length in sorted({*LENGTHS, *limits}):
        yield {**sizes, **{name: length + 2 * i for i, name in enumerate(free)}}


def _constants(graph: fx.GraphModule, mask: fx.Node) -> set[int]:
    """Magnitudes of the numbers that a mask is made with: one of them may be a window."""
    numbers: list[Any] = []
    for node in ancestors(mask):
        map_aggregate((node.args, node.kwargs), numbers.append)
        if node.op == "get_attr":
            held = attribute(graph, str(node.target))
            numbers += [held.item()] if held.numel() == 1 else []
    plain = [abs(n) for n in numbers if isinstance(n, int | float) and math.isfinite(n)]
    return {int(n) for n in plain if 2 < n < 1 << 31}


def _shown(mask: Tensor, hides: bool) -> Tensor | None:
    """Boolean [..., queries, keys]; None for an additive mask with values in between."""
    if mask.dtype == torch.bool:
        return ~mask if hides else mask
    if not mask.is_floating_point():
        return (mask == 0) if hides else (mask != 0)
    shown = mask == 0
    return shown if bool((shown | (mask <= HIDDEN)).all()) else None


def _same(shown: Sequence[Tensor | None]) -> Meaning | None:
    """The one meaning that all observations have."""
    flat: list[Tensor] = []
    for mask in shown:
        if mask is None:
            return None
        matrix = mask.reshape(-1, *mask.shape[-2:])
        if not bool((matrix == matrix[:1]).all()):
            return None
        flat.append(matrix[0])
    widest = flat[-1]
    reach = int(_distance(widest)[widest].abs().max()) + 1 if bool(widest.any()) else 0
    for candidate in (Meaning(), Meaning(True), Meaning(True, reach), Meaning(False, reach)):
        if all(torch.equal(mask, _pattern(candidate, mask)) for mask in flat):
            return candidate
    return None


def _distance(mask: Tensor) -> Tensor:
    rows, columns = (torch.arange(size, device=mask.device) for size in mask.shape)
    return rows[:, None] + (len(columns) - len(rows)) - columns[None, :]


def _pattern(candidate: Meaning, mask: Tensor) -> Tensor:
    distance = _distance(mask)
    shown = distance >= 0 if candidate.causal else torch.ones_like(mask)
    return shown & (distance.abs() < candidate.window) if candidate.window else shown


def _cuts(mask: fx.Node) -> Iterator[fx.Node]:
    """Nodes [batch, keys] through which the mask may depend on data, inputs first."""
    keys = str(mask.meta["val"].shape[-1])
    for node in ancestors(mask):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim() == 2 and str(value.shape[1]) == keys:
            yield node


def _padded(
    graph: fx.GraphModule,
    mask: fx.Node,
    trials: Sequence[Sizes],
    hides: bool,
    cut: fx.Node,
    inverted: bool,
) -> Meaning | None:
    """The meaning if `cut` alone carries the data and hides keys by being zero (or nonzero)."""
    generator = torch.Generator().manual_seed(0)
    dtype, device = cut.meta["val"].dtype, runs_on(cut.meta["val"].device)
    open_, checks = list[Tensor | None](), list[tuple[Tensor | None, Tensor]]()
    for sizes in trials:
        shape = shape_at(cut, sizes)
        visible = torch.full(shape, not inverted, device=device)
        try:
            shown = evaluate(graph, mask, sizes, {cut: visible.to(dtype)})
            open_.append(_shown(shown, hides))
            visible = torch.rand(shape, generator=generator).to(device) < 0.6
            shown = evaluate(graph, mask, sizes, {cut: (visible ^ inverted).to(dtype)})
            checks.append((_shown(shown, hides), visible))
        except Unknown:
            return None
    found = _same(open_)
    if found is None:
        return None
    for shown, visible in checks:
        if shown is None or shown.dim() != 4 or shown.shape[0] != visible.shape[0]:
            return None
        expected = _pattern(found, shown[0, 0]) & visible[:, None, None, :]
        if not bool((shown == expected).all()):
            return None
    return Meaning(found.causal, found.window, cut, inverted)
