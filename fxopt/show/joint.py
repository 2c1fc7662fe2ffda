"""Attention and KV cache of one head as the one decision that they are: a plan stores two, whose
costs and errors hold with the other as chosen; readers are shown what both are together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fxopt.ir.changes import PlanDiff
from fxopt.ir.decision import KEEP, Alternative, Decision
from fxopt.ir.evidence import Pair
from fxopt.ir.plan import Plan
from fxopt.ir.site import FAMILIES

JOINT = "attention + kv_cache"
SHOWN = (JOINT, *FAMILIES)
"""Families as pages list them."""
Half = Decision | Alternative


class Joined(Decision):
    """Both decisions of a head as one: costs and errors are those of both together.

    `rewrite` and `label` read as "attention.window w64 + kv_cache.blocks k4v4"; `family` is that of
    the first that is rewritten. Alternatives change one of the two, or keep both.
    """

    parts: list[Decision]


def decided(plan: Plan) -> list[Decision]:
    """The plan's decisions, those of one head joined, where the first of them stands."""
    caches = {d.key: d for d in plan.decisions if d.family == "kv_cache"}
    heads = {d.key for d in plan.decisions if d.family == "attention"} & caches.keys()
    pairs = {pair.key: pair for pair in plan.pairs}
    found: list[Decision] = []
    for decision in plan.decisions:
        if decision.key not in heads or decision.family not in ("attention", "kv_cache"):
            found.append(decision)
        elif decision.family == "attention":
            found.append(_joined(decision, caches[decision.key], pairs.get(decision.key)))
    return found


def parts_of(decision: Decision) -> list[Decision]:
    """The decisions as the plan stores them."""
    return decision.parts if isinstance(decision, Joined) else [decision]


def family_of(decision: Decision) -> str:
    """The family that a decision is listed under."""
    return JOINT if isinstance(decision, Joined) else decision.family


def joined_diff(diff: PlanDiff) -> PlanDiff:
    """The difference with what concerns one head as one."""
    if diff.plans is None:
        return diff
    old, new = (_by_site(plan) for plan in diff.plans)
    touched = [*(after for _, after in diff.changed), *diff.added, *diff.removed]
    pairs: list[tuple[Decision | None, Decision | None]] = []
    for decision in touched:
        site = decision.family, decision.key
        pair = old.get(site), new.get(site)
        if not any(pair[0] is a and pair[1] is b for a, b in pairs):
            pairs.append(pair)
    return PlanDiff(
        added=[b for a, b in pairs if a is None and b is not None],
        removed=[a for a, b in pairs if a is not None and b is None],
        changed=[(a, b) for a, b in pairs if a is not None and b is not None],
        totals=diff.totals,
        facts=diff.facts,
        plans=diff.plans,
    )


def _by_site(plan: Plan) -> Mapping[tuple[str, str], Decision]:
    return {(p.family, p.key): d for d in decided(plan) for p in parts_of(d)}


def _joined(attention: Decision, cache: Decision, pair: Pair | None) -> Joined:
    parts = [attention, cache]
    fresh = pair is not None and pair.choices == [part.choice for part in parts]
    whole = _together(attention, cache)
    locked = [part.locked for part in parts]
    return Joined(
        key=attention.key,
        family="attention" if attention.rewritten or not cache.rewritten else "kv_cache",
        rewrite=whole.rewrite,
        version=whole.version,
        label=whole.label,
        parameters=whole.parameters,
        kernel={**attention.kernel, **cache.kernel},
        cost=whole.cost,
        error=whole.error,
        reason=pair.reason if pair is not None and fresh else "",
        alternatives=list(_alternatives(attention, cache, pair)),
        locked=all(locked),
        calls=whole.calls,
        timed=whole.timed,
        error_measured=pair.error_measured if pair is not None and fresh else whole.error_measured,
        error_within=whole.error_within,
        kept_mass=attention.kept_mass,
        density=attention.density,
        already=[name for part in parts for name in part.already],
        parts=parts,
    )


def _alternatives(attention: Decision, cache: Decision, pair: Pair | None) -> Iterator[Alternative]:
    """Both kept, as far as the plan knows what that takes; then each changed beside the other."""
    found = [_together(other, cache) for other in attention.alternatives]
    found += [_together(attention, other) for other in cache.alternatives]
    if pair is not None and (attention.rewritten or cache.rewritten):
        fresh = pair.choices == [attention.choice, cache.choice]
        yield pair.kept if fresh else pair.kept.model_copy(update={"reason": ""})
        found = [other for other in found if other.rewrite != KEEP]
    yield from found


def _together(attention: Half, cache: Half) -> Alternative:
    """What both take and err. The reason is that of the one which is an alternative."""
    halves = attention, cache
    changed = [half for half in halves if half.rewrite != KEEP]
    further = "".join(f" + {half.rewrite} {half.label}" for half in changed[1:])
    errors = [half.error for half in halves if half.error is not None]
    known = [half.error_measured for half in changed]
    calls = [half.calls or {} for half in halves]
    other = next((half for half in halves if isinstance(half, Alternative)), None)
    if other is not None and other.error_measured is not None:
        known = [other.error_measured]  # which is of both, the other as chosen
    return Alternative(
        rewrite=changed[0].rewrite if changed else KEEP,
        label=f"{changed[0].label}{further}".strip() if changed else "",
        parameters=_parameters(halves),
        version=max(half.version for half in halves),
        cost=attention.cost + cache.cost,
        error=sum(errors) if len(errors) == len(halves) else None,
        feasible=other is None or other.feasible,
        reason=other.reason if other is not None else "",
        calls={n: sum(c.get(n, 0.0) for c in calls) for n in {**calls[0], **calls[1]}} or None,
        timed=[name for name in attention.timed if name in cache.timed],
        error_measured=all(known) if known and None not in known else None,
        error_within=changed[0].error_within if len(changed) == 1 else None,
        kept_mass=attention.kept_mass,
        density=attention.density,
    )


def _parameters(halves: tuple[Half, Half]) -> dict[str, int | float | str | bool]:
    """Those of both; a name that both have is told apart by its family."""
    attention, cache = (half.parameters for half in halves)
    shared = attention.keys() & cache.keys()
    names = zip(("attention", "kv_cache"), (attention, cache), strict=True)
    return {
        f"{family}.{name}" if name in shared else name: value
        for family, values in names
        for name, value in values.items()
    }
