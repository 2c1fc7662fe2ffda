"""Why a site was rewritten or kept, and why not otherwise: a sentence of amounts and rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..ir.cost import Cost
from ..ir.decision import KEEP
from ..ir.units import format_value
from .quality import Quality
from .search import BYTE_ROWS, FASTER, GAP
from .swaps import Swap, Swaps

BETTER = "better by costs corrected after the choice; not solved again"
"""How the reason begins of an alternative that would have been chosen by today's costs."""
ALONE = "better by errors of sites alone; the plan was chosen by errors measured about it"
"""The same of a plan that was."""
SAME = 5e-3
"""The share of its own below which a change of what is minimised is none."""
TIE = 1e-2
"""The share by which what is saved here and what that is worth elsewhere may differ in a tie."""
THINGS = {"latency": "time", "error": "error", "memory": "memory"}


@dataclass(frozen=True)
class Choice:
    """What stands or could stand at a site: its name, its share of the cost and of the error."""

    name: str
    cost: Cost
    error: float

    def amount(self, row: str) -> float:
        """The share of what is minimised."""
        if row == "memory":
            return self.cost.weight_bytes + self.cost.state_bytes
        return self.error if row == "error" else self.cost.seconds


class Explainer:
    """Says why, by the program that a choice was made in.

    `quality` is the budget's name of the error row, `unit` what errors are measured in, `measured`
    how they are: amounts of them are what the whole, as chosen, would err more or less.
    """

    def __init__(self, swaps: Swaps, quality: str, unit: str, measured: Quality) -> None:
        self.swaps, self.quality, self.unit, self.measured = swaps, quality, unit, measured
        self.main = swaps.stand.main
        self.error = swaps.stand.rows(swaps.stand.choice)["error"]
        rows = (row.name for row in swaps.stand.problem.rows)
        # ops are timed only then: what the roofline alone says is no reason
        self.timed = self.main != "error" or any(row.startswith("latency") for row in rows)

    def alternative(self, group: int, option: int, mine: Choice, other: Choice) -> str:
        """Why `option` of `group`, which makes `other` of a site, was not taken."""
        if beside := self.swaps.beside(group, option):
            return f"cannot stand beside the rewrite of {beside}"
        swap = self.swaps.to(group, option)
        more = swap.added[self.main]
        if swap.missing:
            return self._needs(swap, mine, other)
        if self._useless(swap, mine, other):
            return f"a rewrite that saves no bytes has to be {FASTER}x as fast as what it replaces"
        if self.swaps.is_better(swap, GAP * abs(self.swaps.value)):
            better = ALONE if self.swaps.stand.refined else BETTER
            return better + self._saved(mine, other, -more, ": saves ")
        if self._same(mine, other, more) and swap.worth >= 0:
            return self._indifferent(swap, mine, other)
        if more > 0:
            return self._worse(mine, other, more) + self._freed(swap, mine, other)
        return f"would save {self._amount(self.main, more)}: less than the program is solved to"

    def chosen(self, group: int, option: int, mine: Choice, kept: Choice) -> str:
        """What a rewrite serves, and what that is worth; `option` is that which keeps the site."""
        back = self.swaps.to(group, option)
        rows = {r: more for r, more in back.added.items() if more > 0 and r != "error"}
        sizes = {r: more for r, more in rows.items() if not r.startswith("latency")}
        faster = self.timed and mine.cost.seconds < kept.cost.seconds * 0.98
        parts = [self._speed(mine, kept)] if faster else []
        parts += [f"saves {self._listed(sizes)}"] if sizes else []
        if not parts:
            return "gains nothing in this budget's rows"
        return ", ".join(parts) + self._price(sizes, -back.added[self.main])

    def kept(self, group: int, mine: Choice, others: Mapping[int, Choice]) -> str:
        """Why the site stays as it is: what comes nearest to paying."""

        def net(option: int) -> float:
            swap = self.swaps.to(group, option)
            return swap.added[self.main] + swap.worth

        free = [option for option in others if not self.swaps.beside(group, option)]
        if not free:
            first = next(iter(others))
            return self.alternative(group, first, mine, others[first])
        best = min(free, key=net)
        why = self.alternative(group, best, mine, others[best])
        return f"no candidate pays; the nearest, {others[best].name}: {why}"

    def _needs(self, swap: Swap, mine: Choice, other: Choice) -> str:
        missing = sorted(swap.missing)
        text = "; ".join(self._short(row, swap, mine, other) for row in missing)
        more = swap.added[self.main]
        if self.main in missing:
            return text
        less = self._less(swap, mine, other)
        frees = f"; frees {self._amounts_of(less)}" if less else ""
        if self._same(mine, other, more):
            return text + frees
        if more > 0:
            return f"{text}; {self._worse(mine, other, more)}{frees}"
        prices = self.swaps.stand.prices
        worth = sum(prices.get(row, 0.0) * swap.added[row] for row in missing)
        saved = f"to save {self._amount(self.main, more)} here"
        priced = f": worth {self._amount(self.main, -worth)} elsewhere" if worth > 0 else ""
        return f"{text}{priced}, {saved}{_tie(worth, -more)}{frees}"

    def _short(self, row: str, swap: Swap, mine: Choice, other: Choice) -> str:
        full = self.swaps.is_full(row)
        if row == "error":
            more = self._amount(row, other.error - mine.error)
            return f"errs {more} more" + (
                f", and {self.quality} is used up" if full else f" than {self.quality} has room for"
            )
        left = self._amount(row, swap.missing[row])
        rest = "which is used up" if full else f"of which {left} are left"
        return f"needs {self._amount(row, swap.added[row])} more of {row}, {rest}"

    def _worse(self, mine: Choice, other: Choice, more: float) -> str:
        if self.main == "memory":
            return f"takes {self._amount(self.main, more)} more of memory"
        word = "errs" if self.main == "error" else "takes"
        amounts = (self._own(c) for c in (other, mine))
        return f"{word} {' against '.join(amounts)}"

    def _freed(self, swap: Swap, mine: Choice, other: Choice) -> str:
        """What it takes less of other rows, and what that is worth where they bind."""
        less = self._less(swap, mine, other)
        full = {row: amount for row, amount in less.items() if row in self.swaps.binding}
        if full and swap.worth < 0:
            tie = _tie(-swap.worth, swap.added[self.main])
            worth = self._amount(self.main, swap.worth)
            return f"; the {self._amounts_of(full)} that it frees are worth {worth}{tie}"
        if less and not full:
            has = "has" if len(less) == 1 else "have"
            return f"; frees {self._amounts_of(less)}, which {has} room"
        return f"; frees {self._amounts_of(less)}" if less else ""

    def _less(self, swap: Swap, mine: Choice, other: Choice) -> dict[str, float]:
        """What it takes less of rows other than the main one."""
        less = {
            row: mine.error - other.error if row == "error" else -more
            for row, more in swap.added.items()
            if more < 0 and row != self.main
        }
        return {row: amount for row, amount in less.items() if amount > 0}

    def _amounts_of(self, rows: Mapping[str, float]) -> str:
        return " and ".join(f"{self._amount(r, -x)} of {self._name(r)}" for r, x in rows.items())

    def _indifferent(self, swap: Swap, mine: Choice, other: Choice) -> str:
        same = f"for the same {THINGS.get(self.main, self.main)}"
        if other.error > mine.error and "error" in {*swap.added, self.main}:
            return f"errs {self._amount('error', other.error - mine.error)} more {same}"
        row = max(swap.added, key=lambda name: (name != self.main, swap.added[name]))
        if row != self.main and swap.added[row] > 0:
            return f"needs {self._amount(row, swap.added[row])} more of {self._name(row)} {same}"
        row = min(swap.added, key=lambda name: (name == self.main, swap.added[name]))
        if row != self.main and swap.added[row] < 0:
            return (
                f"saves {self._amount(row, -swap.added[row])} of {self._name(row)}, which has room"
            )
        return "no better in any row of the budget"

    def _speed(self, mine: Choice, kept: Choice) -> str:
        if mine.cost.seconds <= 0 or kept.cost.seconds <= 0:
            return f"takes {self._amount('latency', kept.cost.seconds - mine.cost.seconds)} less"
        return f"{kept.cost.seconds / mine.cost.seconds:.2f}x speed"

    def _listed(self, rows: Mapping[str, float]) -> str:
        text = self._amounts_of(rows)
        full = [row for row in rows if self.swaps.is_full(row)]
        if not full:
            return text
        if len(full) == len(rows):
            return text + (", which is used up" if len(rows) == 1 else ", which are used up")
        return f"{text}; {' and '.join(full)} is used up"

    def _price(self, saved: Mapping[str, float], spent: float) -> str:
        """What the saved bytes are worth elsewhere, against what the site takes more itself."""
        prices = self.swaps.stand.prices
        worth = sum(prices.get(row, 0.0) * more for row, more in saved.items() if row != self.main)
        if worth <= 0:
            return ""
        here = f", for {self._amount(self.main, -spent)} here" if spent > 0 else ""
        here += _tie(worth, spent)
        return f": worth {self._amount(self.main, -worth)} elsewhere{here}"

    def _saved(self, mine: Choice, other: Choice, less: float, before: str) -> str:
        return "" if self._same(mine, other, less) else before + self._amount(self.main, -less)

    def _same(self, mine: Choice, other: Choice, change: float) -> bool:
        own = max(abs(mine.amount(self.main)), abs(other.amount(self.main)))
        return abs(change) <= SAME * own

    def _useless(self, swap: Swap, mine: Choice, other: Choice) -> bool:
        """Whether the search left it out for being about as fast, and no smaller."""
        slow = other.cost.seconds < mine.cost.seconds < other.cost.seconds * FASTER
        smaller = any(more < 0 for row, more in swap.added.items() if row in BYTE_ROWS)
        return slow and mine.name == KEEP and not smaller

    def _name(self, row: str) -> str:
        return self.quality if row == "error" else row

    def _own(self, choice: Choice) -> str:
        """The share of what is minimised, an error as it is measured with this site alone."""
        amount = choice.amount(self.main)
        amount = self.measured.measured(amount) if self.main == "error" else amount
        return format_value(amount, self._unit(self.main))

    def _amount(self, row: str, change: float) -> str:
        """So much more of a row, or less."""
        amount = self.measured.step(self.error, change) if row == "error" else change
        return format_value(abs(amount), self._unit(row))

    def _unit(self, row: str) -> str:
        return "s" if row.startswith("latency") else self.unit if row == "error" else "bytes"


def _tie(worth: float, here: float) -> str:
    """The word for a trade that the solver could as well have made the other way round."""
    return ": a tie" if abs(worth - here) <= TIE * max(worth, here) else ""
