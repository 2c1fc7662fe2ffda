"""What was recorded of the sites on the fit part: what every score is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from ..ir.site import GroupInfo, Site
from . import shrinkage

T = TypeVar("T")


@dataclass
class Recorded:
    """Recordings at one node. `gradients` are of the sampled log-likelihood, by `inputs`' rows
    (linear [T, out], scaled so that the sum of their squares stands for that over all positions) or
    whole (attention [B, N, H, Dv])."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    outputs: Tensor | None = None
    gradients: Tensor | None = None
    gram_sum: Tensor | None = None
    gram_rows: int = 0
    members: tuple[Recorded, ...] = ()
    made: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """`make()` of the first call under this name."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    @property
    def gram(self) -> Tensor:
        """E[x xT] in float64, [in, in], shrunk as far as the rows that were seen are few."""
        if self.gram_sum is None:
            raise ValueError("no input was recorded at this site")
        rows = max(self.gram_rows, 1)
        seen = self.gram_sum / rows
        return shrinkage.shrunk(seen, shrinkage.intensity(seen, rows))

    def exact(self) -> Tensor:
        """What a linear, an embedding, or an expert each returns for the rows in `inputs`."""
        assert self.weight is not None
        if not self.inputs["x"].is_floating_point():
            return self.weight[self.inputs["x"][:, 0]]
        if "expert" in self.inputs:
            return _by_expert(self.inputs["x"], self.weight, self.inputs["expert"])
        y = self.inputs["x"] @ self.weight.T
        return y if self.bias is None else y + self.bias


@dataclass
class Statistics:
    """Recordings by node name; `positions` that counted in all; see `second_order`."""

    nodes: dict[str, Recorded]
    positions: int
    attention_positions: int
    _sharing: tuple[tuple[str, str], Recorded] | None = field(default=None, repr=False)

    def at(self, site: Site) -> Recorded:
        """What was recorded at the node of `site`; a group has its members' as well."""
        recorded = self.nodes[site.node]
        if not isinstance(site.info, GroupInfo):
            return recorded
        return replace(recorded, members=tuple(map(self.at, site.info.members)))

    def sharing(self, site: Site) -> Recorded:
        """The same, with room for what the site's candidates share: it goes when another site is
        asked for."""
        where = site.family, site.key
        if self._sharing is None or self._sharing[0] != where:
            self._sharing = None  # before another site is recorded
            self._sharing = where, replace(self.at(site), made={})
        return self._sharing[1]

    def passes(self, sites: Iterable[Site]) -> list[list[Site]]:
        """The sites whose recordings are held together, one list after the other: here all."""
        found = list(sites)
        return [found] if found else []

    def expect(self, sites: Iterable[Site]) -> None:
        """Say which sites will be asked for, the first ones first."""

    def second_order(self, site: Site, change: Tensor) -> float:
        """Fisher-Taylor estimate of the additive error that `change` of the site's recorded
        output makes: 1/2 sum_t <g_t, change_t>^2 over the positions that count.

        `change` has the shape of the recorded gradients; attention sites count their head only.
        """
        recorded = self.at(site)
        if recorded.gradients is None:
            return 0.0
        product = recorded.gradients.float() * change.float()
        if site.head is not None:
            info = site.info
            group = info.num_heads // info.num_kv_heads  # type: ignore[union-attr]
            heads = slice(site.head * group, (site.head + 1) * group)
            product = product[:, :, heads].flatten(2)
            count = max(self.attention_positions, 1)
        else:
            count = max(self.positions, 1)
        inner = product.sum(-1)
        return 0.5 * inner.square().sum().item() / count


def _by_expert(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """Each row times the transposed weight of its expert."""
    y = x.new_empty((len(x), weight.shape[1]))
    for e in expert.unique().tolist():
        y[expert == e] = x[expert == e] @ weight[e].T
    return y


class OnDemand:
    """`Statistics.sharing(site)` for a rewrite, recorded when it first asks: most of those that
    fit nothing never do."""

    def __init__(self, statistics: Statistics, site: Site) -> None:
        self._statistics, self._site = statistics, site

    def __getattr__(self, name: str) -> Any:
        return getattr(self._statistics.sharing(self._site), name)
