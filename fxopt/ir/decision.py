"""Decisions: what happens at one site, what else was possible there, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from .cost import Cost
from .errors import PlanError
from .names import hint
from .site import FAMILIES, Family

KEEP = "keep"
BY_HAND = "chosen by hand"
"""The reason of a decision that `Decision.choose` made."""


def _rewrite_name(name: str) -> str:
    family, _, rest = name.partition(".")
    if name != KEEP and (family not in FAMILIES or not rest):
        raise ValueError(f"{name!r} is not {KEEP!r} or a name like 'linear.low_rank'")
    return name


RewriteName = Annotated[str, AfterValidator(_rewrite_name)]
ParameterValues = dict[str, int | float | str | bool]


class PlanModel(BaseModel):
    # JSON has no infinity: such numbers are stored as texts, and read back.
    model_config = ConfigDict(extra="forbid", validate_assignment=True, ser_json_inf_nan="strings")


class KeptMass(PlanModel):
    """The mean part of a head's attention that falls on the keys which a mask leaves visible, over
    queries sampled from calibration data, and its 95% confidence interval. `near`: the mask hides
    keys by how far they are."""

    mean: float
    low: float
    high: float
    near: bool

    def __str__(self) -> str:
        return f"{self.mean:.1%} (95%: {self.low:.1%} to {self.high:.1%})"


class Alternative(PlanModel):
    """What else was possible at a site, and why it was not chosen. Keeping the site is one too.

    `feasible` says whether any plan within the budget could have it; the rest as in `Decision`.
    """

    rewrite: RewriteName
    label: str = ""
    parameters: ParameterValues = Field(default_factory=dict)
    version: int = 1
    cost: Cost = Cost()
    error: float | None = None
    feasible: bool = True
    reason: str = ""
    calls: dict[str, float] | None = None
    timed: list[str] = Field(default_factory=list)
    error_measured: bool | None = None
    error_within: float | None = None
    kept_mass: KeptMass | None = None
    density: float | None = None


class Refused(PlanModel):
    """A site that a rewrite (or, with `rewrite` None, any rewrite) cannot serve, and why."""

    family: Family
    key: str
    reason: str
    rewrite: RewriteName | None = None


class Decision(PlanModel):
    """What happens at one site.

    `key` is `fqn[#ordinal][/kv=h]`; `rewrite` is "family.name" or "keep"; `label` is the short
    name of the candidate; `kernel` its pinned configuration; `cost` that of the site as decided;
    `error` the predicted change of the quality row (None: unknown); `reason` says why this was
    chosen or why the site was kept. `alternatives` holds the other candidates, "keep" among them
    when the site is rewritten. `locked` decisions are not solved again.

    For readers alone: `calls` are the seconds behind `cost`, of one call of each kind that the
    workload makes, and `timed` the kinds that were timed (others are the roofline's);
    `error_measured` says whether `error` was measured by swapping this site alone, and
    `error_within` is half of its 95 % interval (None: unknown); `kept_mass` is what a mask of
    attention leaves, None where none is chosen; `density` the part of its work that a choice by
    the data is expected to do, which `cost` is of; `already` names rewrites that would change
    nothing, since the call is what they make.
    """

    key: str
    family: Family
    rewrite: RewriteName = KEEP
    version: int = 1
    label: str = ""
    parameters: ParameterValues = Field(default_factory=dict)
    kernel: dict[str, Any] = Field(default_factory=dict)
    cost: Cost = Cost()
    error: float | None = None
    reason: str = ""
    alternatives: list[Alternative] = Field(default_factory=list[Alternative])
    locked: bool = False
    calls: dict[str, float] | None = None
    timed: list[str] = Field(default_factory=list)
    error_measured: bool | None = None
    error_within: float | None = None
    kept_mass: KeptMass | None = None
    density: float | None = None
    already: list[RewriteName] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check_family(self) -> Decision:
        if self.rewritten and self.rewrite.partition(".")[0] != self.family:
            raise ValueError(f"{self.rewrite!r} is no rewrite of the family {self.family!r}")
        return self

    @property
    def rewritten(self) -> bool:
        return self.rewrite != KEEP

    @property
    def choice(self) -> str:
        """What stands at the site, in a few words."""
        return f"{self.rewrite} {self.label}".strip() if self.rewritten else "kept"

    @property
    def members(self) -> list[str]:
        """Keys of the linears that a group stands for, "mlp.gate_proj+up_proj" or, from several
        modules, "a.proj+b.proj"; none where it is one linear."""
        first, *others = self.key.split("+")
        prefix = f"{first.rpartition('.')[0]}." if "." in first else ""
        every = [first, *(other if "." in other else prefix + other for other in others)]
        return every if others else []

    @property
    def kept(self) -> Cost | None:
        """What the site costs as it was, where the plan knows."""
        if not self.rewritten:
            return self.cost
        return next((other.cost for other in self.alternatives if other.rewrite == KEEP), None)

    def choose(self, rewrite: str, label: str | None = None) -> None:
        """Swap the decision for one of its alternatives; PlanError where there is no such one."""
        if rewrite == self.rewrite and label in (None, self.label):
            return
        found = [
            other
            for other in self.alternatives
            if other.rewrite == rewrite and label in (None, other.label)
        ]
        if len(found) != 1:
            raise PlanError(_no_choice(self, rewrite, label, found))
        chosen = found[0]
        mine = Alternative(
            rewrite=self.rewrite,
            label=self.label,
            parameters=self.parameters,
            version=self.version,
            cost=self.cost,
            error=self.error,
            reason="replaced by hand",
            calls=self.calls,
            timed=self.timed,
            error_measured=self.error_measured,
            error_within=self.error_within,
            kept_mass=self.kept_mass,
            density=self.density,
        )
        for other in self.alternatives:
            # these compare with what was chosen before
            other.reason = "" if other.feasible else other.reason
        self.alternatives = [mine if other is chosen else other for other in self.alternatives]
        self.rewrite, self.version, self.label = chosen.rewrite, chosen.version, chosen.label
        self.parameters, self.kernel = chosen.parameters, {}
        self.cost, self.error, self.reason = chosen.cost, chosen.error, BY_HAND
        self.calls, self.timed = chosen.calls, chosen.timed
        self.error_measured, self.error_within = chosen.error_measured, chosen.error_within
        self.kept_mass, self.density = chosen.kept_mass, chosen.density


def _no_choice(
    decision: Decision, rewrite: str, label: str | None, found: Sequence[Alternative]
) -> str:
    site = f"the {decision.family} site {decision.key!r}"
    if found:
        labels = ", ".join(repr(other.label) for other in found)
        return f"{site} has {len(found)} alternatives {rewrite!r}: give a label of {labels}"
    here = [other for other in decision.alternatives if other.rewrite == rewrite]
    if here and label is not None:
        labels = [other.label for other in here]
        return f"{site} has no {rewrite!r} labelled {label!r}, only {labels}.{hint(label, labels)}"
    offered = list(dict.fromkeys(other.rewrite for other in decision.alternatives))
    return f"{site} has no alternative {rewrite!r}, only {offered}.{hint(rewrite, offered)}"
