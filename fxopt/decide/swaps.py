"""One decision changed and all else as chosen: what that adds to each row, and what it is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .outlook import Standing
from .peaks import row_of

BINDS = 1e-4
"""The share of what is minimised that a limit twice as large must be worth, to bind."""
ROUNDING = 1e-9


@dataclass(frozen=True)
class Swap:
    """What another option adds to each row, by name; of a peak, where least is left of it.

    `missing` holds the rows that would not be kept. `worth` is what the changes in all rows but
    the main one cost by their prices: negative where they free more than they take.
    """

    added: Mapping[str, float]
    missing: frozenset[str]
    worth: float


class Swaps:
    """Swaps of the decisions of a choice, by its program."""

    def __init__(self, stand: Standing) -> None:
        self.stand = stand
        self.left = stand.left()
        self.value = stand.rows(stand.choice)[stand.main]
        self.binding = frozenset(filter(self._binds, map(row_of, self.left)))

    def _binds(self, name: str) -> bool:
        limit = max(abs(r.limit) for r in self.stand.problem.rows if row_of(r.name) == name)
        return self.stand.prices.get(name, 0.0) * limit > BINDS * abs(self.value)

    def to(self, group: int, option: int) -> Swap:
        """Taking `option` in `group`."""
        options = self.stand.problem.groups[group].options
        mine, other = options[self.stand.choice[group]], options[option]
        main = self.stand.main
        added = {main: other.amount(main) - mine.amount(main)}
        shorts: dict[str, float] = {}
        for row in self.stand.problem.rows:
            name, more = row_of(row.name), other.amount(row.name) - mine.amount(row.name)
            short = more - max(self.left[row.name], ROUNDING * abs(row.limit))
            if short > shorts.get(name, -float("inf")):
                added[name], shorts[name] = more, short
        prices = self.stand.prices
        return Swap(
            added,
            frozenset(name for name, short in shorts.items() if short > 0 and added[name] > 0),
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
