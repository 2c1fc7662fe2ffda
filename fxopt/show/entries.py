"""The sites of a plan as pages list them: each once, with all that is known of it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from fxopt.ir.plan import Decision, Plan, Refused

from .fold import QUANTITY, merge_sentences, sentence_shape
from .joint import SHOWN, Joined, decided, family_of, parts_of

MARKS = {"~": "rewritten", "=": "kept", "!": "locked", "x": "refused"}


@dataclass(frozen=True)
class Entry:
    """One site, or attention and cache of a head: a mark, what stands there, why, what refused
    it; `decision` if it has one."""

    mark: str
    key: str
    family: str
    what: str
    reasons: tuple[str, ...]
    decision: Decision | None = None

    @property
    def families(self) -> tuple[str, ...]:
        """The families of its decisions."""
        return tuple(self.family.split(" + "))

    @property
    def stored(self) -> list[Decision]:
        """Its decisions as the plan has them."""
        return parts_of(self.decision) if self.decision is not None else []


def entries(plan: Plan) -> list[Entry]:
    """Every site of the plan's decisions, then those that were only refused."""
    refused: dict[tuple[str, str], list[Refused]] = {}
    for refusal in plan.refusals:
        refused.setdefault((refusal.family, refusal.key), []).append(refusal)
    made = [
        _decided(d, [refused.pop((part.family, part.key), []) for part in parts_of(d)])
        for d in decided(plan)
    ]
    alone = [
        Entry("x", key, family, "refused", _sentences(refusals))
        for (family, key), refusals in refused.items()
    ]
    return made + alone


def summary(plan: Plan) -> str:
    """How many sites are rewritten, kept though candidates existed, and served by no rewrite."""
    sites = entries(plan)
    rewritten = sum(entry.decision is not None and entry.decision.rewritten for entry in sites)
    refused = sum(entry.mark == "x" for entry in sites)
    locked = sum(entry.mark == "!" for entry in sites)
    kept = len(sites) - rewritten - refused
    counts = f"Plan: {rewritten} rewritten, {kept} kept, {refused} refused"
    return counts + (f" ({locked} locked)" if locked else "")


def why(decision: Decision) -> str:
    """The reason of a decision; of a kept site without one, why each alternative was not taken."""
    if decision.reason or decision.rewritten:
        return decision.reason or "no reason given"
    others = [other for other in decision.alternatives if other.rewrite != decision.rewrite]
    if not others:
        return "no rewrite serves this site"
    default = {True: "not worth its cost", False: "does not fit the budget"}
    return "; ".join(
        f"not {f'{other.rewrite} {other.label}'.strip()}: {other.reason or default[other.feasible]}"
        for other in others
    )


def reasons_of(decision: Decision) -> tuple[str, ...]:
    """Why a decision was made, refusals aside."""
    return _decided(decision, [() for _ in parts_of(decision)]).reasons


def shown_together(entry: Entry) -> Hashable:
    """What is equal of sites that are listed as one."""
    parameters = tuple(sorted(entry.decision.parameters.items())) if entry.decision else ()
    return (entry.mark, entry.what, parameters, *map(sentence_shape, entry.reasons))


def said_together(equal: Sequence[Entry]) -> list[str]:
    """The reasons of sites that are listed as one. Their costs are added up, and amounts in the
    reason of a rewritten one are its own."""
    texts = [merge_sentences(reasons) for reasons in zip(*(e.reasons for e in equal), strict=True)]
    decision = equal[0].decision
    rewritten = decision is not None and decision.rewritten
    if len(equal) > 1 and rewritten and texts and QUANTITY.search(texts[0]):
        texts[0] = f"each: {texts[0]}"
    return texts


def _decided(decision: Decision, refusals: Sequence[Sequence[Refused]]) -> Entry:
    """`refusals` of each of the decision's parts."""
    served = decision.rewritten or decision.alternatives or decision.already
    mark = "!" if decision.locked else "~" if decision.rewritten else "=" if served else "x"
    mark = "=" if mark == "x" and not any(refusals) else mark
    what = "refused" if mark == "x" else decision.choice
    each = zip(parts_of(decision), refusals, strict=True)
    said = [_said(part, found, mark) for part, found in each]
    reasons = _of_both(decision, said) if isinstance(decision, Joined) else said[0]
    return Entry(mark, decision.key, family_of(decision), what, reasons, decision)


def _said(decision: Decision, refusals: Sequence[Refused], mark: str) -> tuple[str, ...]:
    """Why one site is what it is, and what refused it."""
    reasons = _sentences(refusals)
    if decision.reason or mark != "x":
        reasons = (why(decision), *(text for text in reasons if text != decision.reason))
    return reasons


def _of_both(joined: Joined, said: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """What is said of a head: first what is said of it as one, then of attention and of cache."""
    texts = [joined.reason] if joined.reason else []
    changed = [part for part in joined.parts if part.rewritten]
    order = sorted(zip(joined.parts, said, strict=True), key=lambda each: not each[0].rewritten)
    for part, own in order:
        if joined.reason or changed == [part]:
            texts += own[: not joined.reason]
            own = own[1:]
        own = [*own, *(["locked"] if part.locked and not joined.locked else [])]
        texts += [t if t.startswith(f"{part.family}.") else f"{part.family}: {t}" for t in own]
    return tuple(dict.fromkeys(texts))


def _sentences(refusals: Sequence[Refused]) -> tuple[str, ...]:
    texts = [f"{r.rewrite}: {r.reason}" if r.rewrite else r.reason for r in refusals]
    return tuple(dict.fromkeys(texts))


def ops_of(key: str) -> list[str]:
    """The ops that a site stands for: one without its head, or the members of a group, whose
    key is "mlp.gate_proj+up_proj" or, from several modules, "a.proj+b.proj"."""
    first, *others = key.partition("/kv=")[0].split("+")
    prefix = first.rpartition(".")[0]
    prefix = f"{prefix}." if prefix else ""
    return [first, *(other if "." in other else prefix + other for other in others)]


def counted(decisions: Sequence[Decision]) -> list[Decision]:
    """The decisions whose costs add up to the model's: a group or its members, never both."""
    groups = [d for d in decisions if len(ops_of(d.key)) > 1]
    within = {op for group in groups if group.rewritten for op in ops_of(group.key)}
    return [
        d
        for d in decisions
        if (d.rewritten if d in groups else d.family != "linear" or d.key not in within)
    ]


def by_family(sites: Sequence[Entry]) -> Mapping[str, list[Entry]]:
    """The entries of each family that has any."""
    found = {family: [site for site in sites if site.family == family] for family in SHOWN}
    return {family: listed for family, listed in found.items() if listed}
