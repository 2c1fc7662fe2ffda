"""What changes from one plan to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .decision import Decision
from .errors import RowResult
from .store import write_text

if TYPE_CHECKING:
    from .plan import Plan

DECIDED = ("rewrite", "version", "label", "parameters", "kernel", "locked")


@dataclass(frozen=True)
class PlanDiff:
    """Decisions matched by family and key, and the totals and facts beside them.

    False when both plans decide the same under the same budget and workload: measured totals and
    costs alone, which differ from run to run, make no difference. `plans` are the two, for pages.
    """

    added: list[Decision] = field(default_factory=list[Decision])
    removed: list[Decision] = field(default_factory=list[Decision])
    changed: list[tuple[Decision, Decision]] = field(
        default_factory=list[tuple[Decision, Decision]]
    )
    totals: list[tuple[RowResult | None, RowResult | None]] = field(
        default_factory=list[tuple[RowResult | None, RowResult | None]]
    )
    facts: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    plans: tuple[Plan, Plan] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def between(cls, before: Plan, after: Plan) -> PlanDiff:
        old = {(d.family, d.key): d for d in before.decisions}
        new = {(d.family, d.key): d for d in after.decisions}
        changed = [(old[site], d) for site, d in new.items() if site in old]
        rows = _by_name(before), _by_name(after)
        totals = [(rows[0].get(name), rows[1].get(name)) for name in {**rows[0], **rows[1]}]
        return cls(
            added=[d for site, d in new.items() if site not in old],
            removed=[d for site, d in old.items() if site not in new],
            changed=[pair for pair in changed if differs(*pair)],
            totals=[(a, b) for a, b in totals if a != b],
            facts=[
                (name, repr(a), repr(b))
                for name in (
                    "budget",
                    "workload",
                    "at",
                    "fingerprint_structure",
                    "fingerprint_weights",
                )
                if (a := _stored(before, name)) != (b := _stored(after, name))
            ],
            plans=(before, after),
        )

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.facts)

    def to_html(self, path: str | Path) -> Path:
        """Write the difference as one self-contained page."""
        page = import_module("..show.html", __package__).render_diff(self)
        return write_text(Path(path), page)

    def __str__(self) -> str:
        return import_module("..show.diff", __package__).render(self)


def differs(before: Decision, after: Decision) -> bool:
    """Whether two decisions for one site would be applied, or solved again, differently."""
    return any(getattr(before, name) != getattr(after, name) for name in DECIDED)


def _by_name(plan: Plan) -> Mapping[str, RowResult]:
    return {row.name: row for row in plan.totals}


def _stored(plan: Plan, name: str) -> Any:
    value = getattr(plan, name)
    # A metric that was read from a file equals the function that it names.
    return value.model_dump(exclude_none=True) if name == "budget" else value
