"""Attention of image and video models -> the window around each place of their grid of tokens.

    attend(q, k, v)
    attend(q, k, v, grid=(1, 64, 64), near=(8, 0))    # KV head 0 only, 15 x 15 places or more
    attend(q, k, v, grid=(1, 64, 64), near=(8, 0), dilation=(2, 1))    # every other one of 29 x 29
    attend(q, k, v, grid=(0, 16, 48, 48), near=(4, 0), dilation=(1, 2, 2, 1, 1, 1))    # of a video

Pays at high resolutions, in heads that look around (NATTEN; Faster Neighborhood Attention;
generalized neighborhood attention, whose stride is the tile here). A window along the sequence, as
`attention.window` has, is a few whole rows of the image instead. Dilated (DiNAT), it reaches
further at the same cost, for heads that look far where values change slowly; along some axes
alone, where others are short or, as time in a video, are better looked at step by step. Tokens
before the grid's, such as a class token, see all and are seen by all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics, Statistic
from fxopt.ir.site import Family, Site
from fxopt.ir.workload import Scenario
from fxopt.kernels.attention.grid import Dilation, density, dilations, edge, listed, near_keys
from fxopt.passes.attention import calls, emulation, mass


@dataclass(frozen=True)
class Neighborhood:
    """A place of the grid sees those nearer than one of `reaches` along each axis, and the tiles in
    which these lie; a reach is offered where at most `most` of the pairs are computed under it, and
    fewer than under the next larger one. One of `dilations`, at a reach of one tile, is offered
    where more places along some axis are of one residue than such a window has: along all axes,
    and along those alone, of a video without the time."""

    reaches: tuple[int, ...] = (4, 8, 16, 32)
    dilations: tuple[int, ...] = (2, 4)
    most: float = 0.6

    name: ClassVar[str] = "attention.neighborhood"
    family: ClassVar[Family] = "attention"
    workloads: ClassVar[frozenset[str]] = frozenset({"forward"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.04690"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.INPUTS})
    near: ClassVar[bool] = True
    decoding: ClassVar[bool] = False

    def match(self, site: Site) -> Match | Refusal:
        if reason := calls.refusal(site):
            return reason
        info = calls.attention_info(Match(site))
        if info.causal:
            return Refusal("attention is causal: tokens of images see those behind them too")
        if not info.grid:
            return Refusal(f"no grid of tokens: {info.no_grid}")
        if info.has_bias or info.has_mask:
            given = "bias is added to the scores" if info.has_bias else "mask hides keys"
            return Refusal(f"a {given}: the kernel of whole tiles does not read it")
        if info.window:
            return Refusal(f"the model itself attends only within {info.window} tokens")
        return Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        grid = calls.attention_info(match).grid
        return [
            Candidate(self.name, _window(grid, near), {"near": near})
            for near in self._fitting(grid)
        ] + [
            Candidate(
                self.name,
                f"{_window(grid, edge(grid), dilation)}/{calls.dilation_label(dilation)}",
                {"near": edge(grid), "dilation": _written(dilation)},
            )
            for each in self.dilations
            for dilation in _spacings(grid, each)
            if density(grid, edge(grid), dilation) <= self.most
        ]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """Why there is no candidate for these scenarios, in numbers; None if there are some."""
        grid = calls.attention_info(match).grid
        if self.candidates(match, scenarios):
            return None
        least = min(self.reaches)
        return (
            f"the grid has {' x '.join(map(str, grid[1:]))} tokens: with the tiles around windows "
            f"of {_window(grid, least)}, {density(grid, least):.0%} of the attention would still "
            f"be computed, and it pays below {self.most:.0%}"
        )

    def _fitting(self, grid: tuple[int, ...]) -> list[int]:
        # Reaches that see the same tiles are one candidate.
        by_density = {density(grid, near): near for near in sorted(self.reaches)}
        return sorted(near for part, near in by_density.items() if part <= self.most)

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """The pairs of whole tiles, and the tokens put in their order and back."""
        info, near, dilation = calls.attention_info(match), _near(candidate), _dilation(candidate)
        return [calls.neighborhood_call(info, scenario, near, dilation)]

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        return {}

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        """Every head of the op under this window."""
        grid, heads = calls.attention_info(match).grid, inputs["k"].shape[1]
        spacings = listed([_dilation(candidate)] * heads, grid)
        return emulation.attended(inputs, grid=grid, near=[_near(candidate)], dilation=spacings)

    def is_mask(self, candidate: Candidate) -> bool:
        return True

    def kept_mass(
        self, match: Match, candidate: Candidate, inputs: Mapping[str, Any], rows: Tensor
    ) -> Tensor:
        """Of the tiles that each query sees."""
        grid, queries = calls.attention_info(match).grid, inputs["q"].shape[2]
        near, dilation = [_near(candidate)], [_dilation(candidate)]
        visible = near_keys(queries, grid, near, dilation, rows.device, rows)
        return mass.kept(inputs, rows, visible[:, 0])

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        site, info = match.site, calls.attention_info(match)
        near = calls.with_value(site, editor, "near", _near(candidate), info.num_kv_heads)
        options = {"near": near}
        if (dilation := _dilation(candidate)) != 1:
            given: Any = editor.node(site).kwargs.get("dilation", (1,))
            spacings = dilations(given, info.num_kv_heads, info.grid)
            for head in range(info.num_kv_heads) if site.head is None else (site.head,):
                spacings[head] = dilation
            options["dilation"] = listed(spacings, info.grid)
        editor.update(site, grid=info.grid, **options)


def _near(candidate: Candidate) -> int:
    return int(candidate.parameters["near"])


def _written(dilation: Dilation) -> int | str:
    # Parameters are no lists.
    return dilation if isinstance(dilation, int) else calls.dilation_label(dilation)


def _dilation(candidate: Candidate) -> Dilation:
    given = candidate.parameters.get("dilation", 1)
    return tuple(map(int, given.split("x"))) if isinstance(given, str) else int(given)


def _spacings(grid: tuple[int, ...], each: int) -> list[Dilation]:
    """A dilation of all axes, and one of those alone that are worth it, where they differ."""
    sizes = grid[1:]
    long = [size // each > 2 * edge(grid) - 1 for size in sizes]
    if not any(long):
        return []
    if len(sizes) == 3 and any(long[1:]):
        long[0] = False  # time
    uneven = tuple(
        each if is_long or size == 1 else 1 for size, is_long in zip(sizes, long, strict=True)
    )
    return [each] if min(uneven) == each else [each, uneven]


def _window(grid: tuple[int, ...], near: int, dilation: Dilation = 1) -> str:
    """Places that a window in the middle of the grid sees: "15x15"."""
    spacings = [dilation] * (len(grid) - 1) if isinstance(dilation, int) else dilation
    places = (-(-size // each) for size, each in zip(grid[1:], spacings, strict=True))
    return "x".join(str(min(count, 2 * near - 1)) for count in places)
