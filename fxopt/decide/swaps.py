"""One decision changed and all else as chosen: what that adds to each row, and what it is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .outlook import Standing
from .peaks import row_of

BINDS = 1e-4
"""The share of what is minimised that a limit twice as large must be worth, to bind."""
ROUNDING = 1e-9
FULL = 0.05
"""The share of a limit that a row which is used up may leave."""


@dataclass(frozen=True)
class Swap:
    """What another option adds to each row, by name; of a peak, where least is left of it.

    `missing` holds the rows that would not be kept, each with what is left of it. `worth` is what
    the changes in all rows but the main one cost by their prices: negative where they free more
    than they take.
    """

    added: Mapping[str, float]
    missing: Mapping[str, float]
    worth: float


class Swaps:
    """Swaps of the decisions of a choice, by its program."""

    def __init__(self, stand: Standing) -> None:
        self.stand = stand
        self.left = stand.left()
        self.value = stand.rows(stand.choice)[stand.main]
        self.binding = frozenset(filter(self._binds, map(row_of, self.left)))

    def _binds(self, name: str) -> bool:
        return self.stand.prices.get(name, 0.0) * self.limit(name) > BINDS * abs(self.value)

    def is_full(self, name: str) -> bool:
        """Whether a row binds and the choice leaves next to nothing of it: sites are not divided,
        so that a row can stand in the way that is not used up."""
        if name not in self.binding:
            return False
        left = min(x for row, x in self.left.items() if row_of(row) == name)
        return left < FULL * self.limit(name)

    def limit(self, name: str) -> float:
        """The limit of a row; of a peak, at any point."""
        return max(abs(r.limit) for r in self.stand.problem.rows if row_of(r.name) == name)

    def to(self, group: int, option: int) -> Swap:
        """Taking `option` in `group`."""
        options = self.stand.problem.groups[group].options
        mine, other = options[self.stand.choice[group]], options[option]
        main = self.stand.main
        added = {main: other.amount(main) - mine.amount(main)}
        left: dict[str, float] = {}
        for row in self.stand.problem.rows:
            name, more = row_of(row.name), other.amount(row.name) - mine.amount(row.name)
            room = max(self.left[row.name], ROUNDING * abs(row.limit))
            if name not in left or more - room > added[name] - left[name]:
                added[name], left[name] = more, room
        prices = self.stand.prices
        return Swap(
            added,
            {name: room for name, room in left.items() if added[name] > room},
            sum(prices.get(name, 0.0) * more for name, more in added.items() if name != main),
        )

    def beside(self, group: int, option: int) -> str | None:
        """The rewritten decision, by its key, that excludes a rewrite in `group`."""
        if option == 0 or self.stand.choice[group] > 0:
            return None
        for members in self.stand.problem.exclusive:
            for other in members if group in members else ():
                if other != group and self.stand.choice[other] > 0:
                    return self.stand.problem.groups[other].key
        return None

    def is_better(self, swap: Swap, least: float) -> bool:
        """Whether it keeps every row and either saves `least` or is no worse in any row."""
        if swap.missing:
            return False
        changes = swap.added.values()
        return swap.added[self.stand.main] < -least or (max(changes) <= 0 and min(changes) < 0)
