"""What a page says before its tables: rows against limits, what binds, what more would buy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.ir.changes import PlanDiff
from fxopt.ir.cost import Cost
from fxopt.ir.errors import RowResult
from fxopt.ir.plan import Decision, Plan
from fxopt.ir.units import format_value

from .binding import binding, objective, quote, used
from .costs import SAVED, TEMPORARY, change, is_training, saving, together, total
from .entries import Entry, counted, entries, said_together, shown_together
from .fold import fold_keys, groups
from .heads import head_map, roles
from .joint import SHOWN, decided, joined_diff
from .rows import cells, limit_texts, with_missing

ADDITIVE = ("kl", "loss_increase")
QUALITY = (*ADDITIVE, "relative_error", "metric_drop")


@dataclass(frozen=True)
class Card:
    """One row of the budget. `share` is the part of the limit that is used, None without one;
    `others` are further totals of a quality row, which a reader does not need first."""

    row: RowResult
    limit: str
    before: str
    predicted: str
    measured: str
    verdict: str
    share: float | None
    binds: bool
    minimised: bool
    notes: list[str]
    others: list[tuple[str, str]]


@dataclass(frozen=True)
class Line:
    """Sites that are decided alike: folded names, how many they are, and what is said of them."""

    mark: str
    names: list[str]
    count: int
    family: str
    what: str
    saving: list[str]
    reasons: list[str]
    keys: list[str]
    parameters: str = ""


def cards(plan: Plan) -> list[Card]:
    """A card for each row of the budget, and for what is minimised."""
    return [_card(plan, row) for row in rows(plan)]


def rows(plan: Plan) -> list[RowResult]:
    """The rows of the budget, and what is minimised: from the plan's trial if nowhere else."""
    known = with_missing(plan.totals, plan.budget)
    taken = (row for trial in plan.trials if trial.taken for row in trial.rows)
    missing = [row for row in taken if row.name == objective(plan)]
    return known if any(row.name == objective(plan) for row in known) else [*missing[:1], *known]


def _card(plan: Plan, row: RowResult) -> Card:
    _, limit, before, predicted, measured, verdict = cells(row, limit_texts(plan.budget))
    binds = row.name in binding(plan)
    notes = [note.partition(": ")[2] for note in plan.notes if _is_of(note, row)]
    if _is_held_back(plan, row):
        notes.insert(0, "measured on data that nothing was chosen by")
    if row.name == "kv_cache":
        notes.append("before: keys and values in 16 bits, as budgets count them")
    if row.name == "latency" and row.measured is None:
        notes.append("predicted from the sites' own calls; the whole model was not timed")
    if binds and (quoted := quote(plan, row.name)):
        notes.append(f"{quoted} of {objective(plan)}")
    return Card(
        row, limit, before, predicted, measured, verdict, used(row), binds,
        row.name == objective(plan), notes, other_totals(plan, row),
    )  # fmt: skip


def _is_of(note: str, row: RowResult) -> bool:
    return note.startswith(f"{row.name}: ")


def general_notes(plan: Plan) -> list[str]:
    """The plan's notes but those that stand on the card of a row."""
    return [note for note in plan.said if not any(_is_of(note, row) for row in rows(plan))]


def said(plan: Plan) -> list[str]:
    """What is to be said of the plan as a whole beside its notes."""
    texts = [_slower(plan), beside(plan), _chosen_by(plan), _together(plan), defined(plan)]
    return [text for text in [*texts, roles(plan), _untried(plan)] if text]


def said_on_page(plan: Plan) -> list[str]:
    """The same without what the page says elsewhere."""
    elsewhere = beside(plan), _together(plan), defined(plan)
    if head_map(plan) is not None:
        elsewhere += (roles(plan),)
    return [text for text in said(plan) if text not in elsewhere]


def beside(plan: Plan) -> str:
    """Why times of sites and of the whole do not add up."""
    if is_training(plan):
        return _shared(plan)
    row = next((row for row in plan.totals if row.name == "latency"), None)
    kept = total(counted(decided(plan)), lambda decision: decision.kept)
    if row is None or not row.before or kept is None:
        return ""
    whole, own = (format_value(value, "s") for value in (row.before, kept.seconds))
    if kept.seconds > row.before:
        return (
            f"The sites' calls, each timed alone, add up to {own}, more than the {whole} of the "
            "whole model before: their times compare sites, and are no parts of the whole."
        )
    rest = format_value(row.before - kept.seconds, "s")
    return (
        f"What the model takes beside its sites: {rest} of the {whole} before, which is taken to "
        "stay as it is."
    )


def _shared(plan: Plan) -> str:
    """The same of a training step, where tensors are made again from each other."""
    memory = plan.memory
    alone = sum(d.cost.seconds for d in plan.rewritten)
    paid = sum(policy.seconds for policy in memory.policies) if memory else 0.0
    if memory is None or not alone:
        return ""
    own, together = (format_value(value, "s") for value in (alone, paid))
    return (
        f"The time of each tensor is its own, alone, in all {own}; what several are made again "
        f"from runs once, so that the step takes {together} longer."
    )


def defined(plan: Plan) -> str:
    """What temporary bytes are, where any are told of."""
    known = (d for one in plan.rewritten for d in (one.cost, one.kept) if d is not None)
    if is_training(plan) or not any(cost.temporary_bytes for cost in known):
        return ""
    return TEMPORARY


def _slower(plan: Plan) -> str:
    """That limits were met by what takes time, where it was measured."""
    row = next((row for row in plan.totals if row.name == "latency"), None)
    if row is None or not row.before or row.measured is None or row.measured < 1.05 * row.before:
        return ""
    before, now = (format_value(value, row.unit) for value in (row.before, row.measured))
    return (
        f"The whole is slower than the original on this device, {now} against {before} "
        f"({row.measured / row.before:.1f}x): the limits are kept by rewrites that take time here."
    )


def _untried(plan: Plan) -> str:
    names = ", ".join(plan.untried)
    return f"Not tried: {names} (name them in rewrites=)." if names else ""


def _chosen_by(plan: Plan) -> str:
    """What the part of the calibration data that the search chose by says against the other."""
    taken = next((trial for trial in plan.trials if trial.taken), None)
    totals = {row.name: row for row in plan.totals}
    texts = [
        f"{row.name} is {format_value(row.measured, row.unit)} on the part of the calibration data "
        f"that the search chose by, over its limit, and "
        f"{format_value(totals[row.name].measured, row.unit)} on the part kept for verification, "
        "which is what the contract is about"
        for row in (taken.rows if taken else [])
        if row.excess > 0 and row.name in totals and totals[row.name].excess <= 0
    ]
    return "; ".join(texts) + "." if texts else ""


def _together(plan: Plan) -> str:
    """What the errors of single sites add up to, against that of all together."""
    row = next((r for r in plan.totals if r.name in ADDITIVE), None)
    errors = [d.error for d in counted(plan.rewritten) if d.error is not None]
    if row is None or row.measured is None or len(errors) < 2:
        return ""
    return (
        f"{row.name} of each site is its own, all others kept: they add up to "
        f"{format_value(sum(errors), row.unit)}, where all together measure "
        f"{format_value(row.measured, row.unit)}."
    )


def _is_held_back(plan: Plan, row: RowResult) -> bool:
    """Whether a row was measured on data that nothing was chosen by; training has its example."""
    return row.name in QUALITY and row.measured is not None and not is_training(plan)


def other_totals(plan: Plan, row: RowResult) -> list[tuple[str, str]]:
    """Of a quality row that was measured, what else is known of the whole: what each is, and it."""
    if not _is_held_back(plan, row):
        return []
    found = [("predicted by the solver", row.predicted)]
    taken = next((trial for trial in plan.trials if trial.taken), None)
    tried = next((r.measured for r in (taken.rows if taken else []) if r.name == row.name), None)
    found.append(("measured while searching, on other data", tried))
    if row.name in ADDITIVE:
        errors = [d.error for d in counted(plan.rewritten) if d.error is not None]
        found.append(("sites added up, each changed alone", sum(errors)))
    return [(what, format_value(x, row.unit)) for what, x in found if x is not None]


def at_sites_notes(plan: Plan) -> list[str]:
    """What the sums over sites leave out or count otherwise than the rows of the budget."""
    names = {name for name, *_ in at_sites(plan)}
    known = {row.name: row for row in plan.totals}
    notes: list[str] = []
    if SAVED["state_bytes"][0] in names and "kv_cache" in known:
        notes.append("the cache before: in the model's own precision, not in the budget's 16 bits")
    latencies = [row for name, row in known.items() if name.startswith("latency")]
    shown = any(row.name == "latency" for row in rows(plan))
    if not shown and all(row.measured is None for row in latencies):
        notes.append("the time of the whole model was not measured")
    return notes


def at_sites(plan: Plan) -> list[tuple[str, str, str, str]]:
    """What the sites take before and after by the plan's own costs: name, before, after, change."""
    decisions = counted(decided(plan))
    before = total(decisions, lambda decision: decision.kept)
    after: Cost | None = total(decisions, lambda decision: decision.cost)
    if before is None or after is None:
        return []
    lines: list[tuple[str, str, str, str]] = []
    for name, (label, unit) in SAVED.items():
        old, new = getattr(before, name), getattr(after, name)
        if (old or new) and name != "temporary_bytes":
            texts = format_value(old, unit), format_value(new, unit), change(old, new)
            lines.append((label, *texts))
    return lines


def sums(diff: PlanDiff) -> list[tuple[str, str, str, str]]:
    """What the sites that differ take in each plan: name, first, second, change."""
    diff = joined_diff(diff)
    pairs = [*diff.changed, *((None, d) for d in diff.added), *((d, None) for d in diff.removed)]
    sides = [counted([d for d in side if d is not None]) for side in zip(*pairs, strict=True)]
    if not sides:
        return []
    costs = [total(side, lambda decision: decision.cost) or Cost() for side in sides]
    found = [
        (label, *(getattr(cost, name) for cost in costs), unit)
        for name, (label, unit) in SAVED.items()
        if name != "temporary_bytes"
    ]
    plans = diff.plans or (None, None)
    each = zip(sides, plans, strict=True)
    found.append(("error", *(together((d.error or 0.0 for d in side), p) for side, p in each), ""))
    return [
        (label, format_value(old, unit), format_value(new, unit), change(old, new))
        for label, old, new, unit in found
        if old or new
    ]


def lines(plan: Plan) -> dict[str, list[Line]]:
    """The folded decisions by what happened: "rewritten", "kept", "refused"."""
    found: dict[str, list[Line]] = {"rewritten": [], "kept": [], "refused": []}
    order = {family: index for index, family in enumerate(SHOWN)}
    sites = sorted(entries(plan), key=lambda entry: order[entry.family])
    for equal in groups(sites, lambda entry: (entry.family, shown_together(entry))):
        found[_kind(equal[0])].append(_line(equal, plan))
    return found


def _kind(entry: Entry) -> str:
    if entry.mark == "x":
        return "refused"
    return "rewritten" if entry.decision is not None and entry.decision.rewritten else "kept"


def _line(equal: Sequence[Entry], plan: Plan) -> Line:
    first = equal[0]
    decisions: list[Decision] = [entry.decision for entry in equal if entry.decision]
    saved = saving(decisions, plan)
    return Line(
        mark=first.mark,
        names=fold_keys(entry.key for entry in equal),
        count=len(equal),
        family=first.family,
        what=first.what,
        saving=[part.replace("->", "→") for part in saved.split(", ") if part],
        reasons=said_together(equal),
        keys=[entry.key for entry in equal],
        parameters=_parameters(decisions),
    )


def _parameters(decisions: Sequence[Decision]) -> str:
    """What the label of a rewrite stands for, where all were given the same."""
    texts = {
        ", ".join(f"{name} {value}" for name, value in decision.parameters.items())
        for decision in decisions
        if decision.rewritten
    }
    return texts.pop() if len(texts) == 1 else ""
