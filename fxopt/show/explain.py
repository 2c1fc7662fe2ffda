"""Why this and not that: all that a plan knows of a site, as text."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from fxopt.ir.cost import Cost
from fxopt.ir.decision import BY_HAND
from fxopt.ir.names import select
from fxopt.ir.plan import EDITED, KEEP, Alternative, Decision, Plan
from fxopt.ir.units import format_value
from fxopt.ir.workload import scenarios

from . import binding
from .costs import SAVED, is_training, label_of, together
from .entries import Entry, entries, ops_of
from .fold import fold_keys, groups, merge_sentences, sentence_shape
from .joint import parts_of
from .page import Page, has_colours, width

Line = tuple[int, str]
"""Its indentation and its text."""


def render(
    plan: Plan,
    site: str,
    family: str | None = None,
    *,
    colours: bool | None = None,
    columns: int | None = None,
) -> str:
    """The decisions at a site, an op (all its heads) or below a module, each with its costs, what
    it serves, and every alternative with its reason; decisions that read alike as one.

    PlanError, with near names, where nothing is decided or refused.
    """
    page = Page(columns or width())
    found = matching(plan, site, family)
    texts = {id(entry): _lines(plan, entry) for entry in found}

    def alike(entry: Entry) -> Hashable:
        shapes = [(indent, sentence_shape(text)) for indent, text in texts[id(entry)]]
        return (entry.mark, entry.family, entry.what, tuple(shapes))

    for equal in groups(found, alike):
        for name in fold_keys(entry.key for entry in equal):
            page.marked(equal[0].mark, f"{name}  {equal[0].family}: {equal[0].what}")
        for lines in zip(*(texts[id(entry)] for entry in equal), strict=True):
            page.add(merge_sentences([text for _, text in lines]), indent=lines[0][0])
        page.add()
    page.add(binding.sentence(plan))
    if EDITED in plan.said:
        page.add(f"Note: {EDITED}")
    return page.render(has_colours() if colours is None else colours)


def matching(plan: Plan, site: str, family: str | None = None) -> list[Entry]:
    """The sites that a name or `re:` pattern covers: first those named so, then the heads of the
    op, what is below the module, and groups with a part in it."""
    known = [entry for entry in entries(plan) if family in (None, entry.family, *entry.families)]
    names = {id(entry): (entry.key, *ops_of(entry.key)) for entry in known}
    covered = set(select(site, (name for each in names.values() for name in each), "site"))
    found = [entry for entry in known if not covered.isdisjoint(names[id(entry)])]
    return sorted(found, key=lambda entry: entry.key != site)


def _lines(plan: Plan, entry: Entry) -> list[Line]:
    decision = entry.decision
    lines = [(6, reason) for reason in entry.reasons if reason]
    if decision is None or entry.mark == "x":
        return lines
    lines += [(6, text) for text in _costs(plan, decision)]
    if not decision.alternatives:
        return lines
    order = [decision, *decision.alternatives]
    order.sort(key=_worth(plan))
    lines.append((6, f"What else was possible, by {binding.objective(plan)}:"))
    lines += [(8, _option(one, decision, plan)) for one in order]
    return lines


def _costs(plan: Plan, decision: Decision) -> list[str]:
    """Each cost before and after, time with its calls, and the error."""
    before, after = decision.kept, decision.cost
    training = is_training(plan)
    texts = [_cost(name, before, after, training) for name in SAVED if name != "seconds"]
    calls = _calls(plan, decision)
    time = _cost("seconds", before, after, training)
    time += f": {', '.join(calls)}" if time and calls else ""
    known = {True: ", measured alone", False: ", predicted", None: ""}[decision.error_measured]
    error = f"{_error(decision, plan)}{known}" if decision.error is not None else ""
    mass = decision.kept_mass
    kept = f"keeps {mass} of its attention" if mass is not None else ""
    density = decision.density
    expected = f"expected to do {density:.1%} of its work" if density is not None else ""
    texts = [time, *texts, error if decision.rewritten else "", kept, expected]
    return [text for text in texts if text]


def _cost(name: str, before: Cost | None, after: Cost, training: bool) -> str:
    label, unit = label_of(name, training), SAVED[name][1]
    new = getattr(after, name)
    old = new if before is None else getattr(before, name)
    if not old and not new:
        return ""
    texts = format_value(old, unit), format_value(new, unit)
    return f"{label} {texts[1]}" if texts[0] == texts[1] else f"{label} {' -> '.join(texts)}"


def _calls(plan: Plan, decision: Decision) -> list[str]:
    calls = decision.calls or {}
    return [
        f"{call.repeats} x {call.name} {format_value(calls[call.name], 's')} "
        f"({'measured' if call.name in decision.timed else 'roofline'})"
        for call in scenarios(plan.workload)
        if call.name in calls
    ]


def _worth(plan: Plan) -> Callable[[Decision | Alternative], float]:
    """What decides the order: the share of what is minimised."""
    match binding.objective(plan):
        case "latency":
            return lambda one: one.cost.seconds
        case "memory":
            return lambda one: one.cost.weight_bytes + one.cost.state_bytes
        case _:
            return lambda one: one.error or 0.0


def _option(one: Decision | Alternative, chosen: Decision, plan: Plan) -> str:
    name = "keep it" if one.rewrite == KEEP else f"{one.rewrite} {one.label}".strip()
    amounts = _amounts(one, chosen, plan)
    if one is chosen:
        return f"> {name} ({amounts}): chosen"
    fits = "" if not isinstance(one, Alternative) or one.feasible else "never fits: "
    by_hand = not fits and any(part.reason == BY_HAND for part in parts_of(chosen))
    reason = one.reason or ("not compared since the choice was changed by hand" if by_hand else "")
    return f"- {name} ({amounts}): {fits}{reason}".rstrip(": ")


def _amounts(one: Decision | Alternative, chosen: Decision, plan: Plan) -> str:
    texts = [
        format_value(getattr(one.cost, name), SAVED[name][1])
        for name in ("seconds", "weight_bytes", "state_bytes")
        if any(getattr(other.cost, name) for other in (chosen, *chosen.alternatives))
    ]
    texts += [] if one.kept_mass is None else [f"keeps {one.kept_mass.mean:.1%}"]
    texts += [] if one.density is None else [f"{one.density:.1%} of the work expected"]
    return ", ".join([*texts, *filter(None, [_error(one, plan)])])


def _error(one: Decision | Alternative, plan: Plan) -> str:
    """An error, with its 95 % interval where it was measured."""
    if one.error is None:
        return ""
    error, within = together([one.error], plan), one.error_within
    if within is None:
        return f"error {error:.3g}"
    low, high = (together([one.error + off], plan) for off in (-within, within))
    return f"error {error:.3g} ± {(high - low) / 2:.2g}"
