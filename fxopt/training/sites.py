"""The saved tensors of a step as sites of a plan, and what rewrites offer for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ..decide.propose import Proposal, Proposals, propose
from ..ir.cost import CostModel, OpCall
from ..ir.errors import PlanError
from ..ir.rewrite import Rewrite
from ..ir.site import SavedInfo, Site
from ..ir.workload import Train, scenarios
from .pricing import op_call
from .schedule import schedule
from .step import Step, node_key


@dataclass
class Saved:
    """The saved tensors of a step: owner by site key, seconds of each op, what is offered.

    `alone` is what dropping one tensor and no other costs, in seconds a step. `others` are the
    owners by key that the step does not save, but a plan may.
    """

    step: Step
    owners: dict[str, fx.Node]
    others: dict[str, fx.Node]
    sites: dict[str, Site]
    seconds: dict[fx.Node, float]
    alone: dict[str, float]
    proposals: Proposals

    @property
    def droppable(self) -> frozenset[fx.Node]:
        """Owners that some rewrite may compute again."""
        offered = self.proposals.by_site
        return frozenset(o for k, o in self.owners.items() if offered.get(("activation", k)))


def saved_tensors(
    step: Step,
    model: CostModel,
    rewrites: Sequence[Rewrite],
    workload: Train,
    keep: Iterable[str],
) -> Saved:
    """Price the forward's ops and ask every rewrite about every saved tensor."""
    calls = {n: op_call(n) for n in schedule(step, step.saved).runs_again()}
    seconds = {node: _seconds(model, call) for node, call in calls.items()}
    own = dict.fromkeys(step.owner[n] for n in step.forward if n in step.owner)
    rest = [o for o in own if o in step.forward and o not in set(step.saved)]
    keyed = _keyed([*step.saved, *rest])
    owners = dict(list(keyed.items())[: len(step.saved)])
    others = dict(list(keyed.items())[len(step.saved) :])
    again = {k: [] if step.blocked(step.maker(o)) else _runs(step, o) for k, o in owners.items()}
    sites = {k: _site(step, k, o, [calls[n] for n in again[k]]) for k, o in owners.items()}
    alone = {key: sum(seconds[n] for n in nodes) for key, nodes in again.items()}
    found = propose(list(sites.values()), rewrites, scenarios(workload), workload.kind, keep)
    return Saved(step, owners, others, sites, seconds, alone, found)


def _seconds(model: CostModel, call: OpCall) -> float:
    cost = model(call)
    return cost.seconds if cost is not None else 0.0


def _runs(step: Step, owner: fx.Node) -> list[fx.Node]:
    return schedule(step, [owner]).runs_again()


def _site(step: Step, key: str, owner: fx.Node, calls: Sequence[OpCall]) -> Site:
    value: Tensor = owner.meta["val"]
    shape = tuple(map(int, value.shape))
    info = SavedInfo(shape, value.dtype, step.bytes[owner], tuple(calls))
    return Site(
        "activation", key, owner.name, info, op=key, blocked=step.blocked(step.maker(owner))
    )


def _keyed(owners: Iterable[fx.Node]) -> dict[str, fx.Node]:
    """Unique keys: a second tensor of the same op in the same module gets an ordinal."""
    seen: Counter[str] = Counter()
    keyed: dict[str, fx.Node] = {}
    for owner in owners:
        key = node_key(owner)
        keyed[f"{key}#{seen[key]}" if seen[key] else key] = owner
        seen[key] += 1
    return keyed


class Marks:
    """The editor of a step: rewrites of saved tensors mark nodes and edit nothing themselves."""

    def __init__(self, saved: Saved) -> None:
        self._saved = saved

    def node(self, site: Site) -> fx.Node:
        return self._saved.owners[site.key]

    def tensor(self, site: Site, name: str, value: Tensor) -> fx.Node:
        raise _refusal(site, "register a tensor")

    def call(
        self, site: Site, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node:
        raise _refusal(site, "insert a call")

    def replace(self, site: Site, new: fx.Node) -> None:
        raise _refusal(site, "replace a node")

    def update(self, site: Site, **kwargs: Any) -> None:
        raise _refusal(site, "change arguments")


def _refusal(site: Site, what: str) -> PlanError:
    return PlanError(
        f"{site.key}: a rewrite asked to {what} in a training step, where rewrites mark what is "
        "computed again; leave the rewrite out with rewrites="
    )


def applied(saved: Saved, proposals: Iterable[Proposal], mark: str) -> frozenset[fx.Node]:
    """The owners that `proposals` mark when they are applied."""
    editor = Marks(saved)
    for proposal in proposals:
        proposal.rewrite.apply(proposal.match, proposal.candidate, {}, editor)
    return frozenset(owner for owner in saved.owners.values() if owner.meta.get(mark))
