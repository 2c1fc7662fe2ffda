"""The saved tensors of a step as sites of a plan, and what rewrites offer for them."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from ..decide.propose import Proposal, Proposals, propose
from ..decide.verify import peak_live_bytes
from ..ir.cost import Cost, CostModel, OpCall
from ..ir.errors import PlanError
from ..ir.names import select
from ..ir.rewrite import Rewrite
from ..ir.saved import AGAIN, MARK, Image
from ..ir.site import NormInfo, SavedInfo, Site
from ..ir.workload import Train, scenarios
from ..passes.activation.cut_cross_entropy import EARLY
from .derivatives import derivative_of, whole
from .forms import Form, Treatment, parts_of, waiting
from .heads import Cut
from .norms import norms_of
from .pricing import op_call
from .schedule import schedule
from .step import Step, node_key


@dataclass(frozen=True)
class Offer:
    """What a rewrite would do with one saved tensor. `cost`: the seconds that it adds if no other
    tensor is rewritten, and the bytes that stay."""

    proposal: Proposal
    treatment: Treatment
    cost: Cost

    @property
    def name(self) -> tuple[str, str]:
        """Rewrite and label, unique among the offers of a site."""
        return self.proposal.rewrite.name, self.proposal.candidate.label


@dataclass
class Saved:
    """The saved tensors of a step: owner by site key, seconds of each op, what is offered.

    `alone` is what dropping one tensor and no other costs, in seconds a step. `others` are the
    owners by key that the step does not save, but a plan may. `heads` are the logits of losses by
    key: sites as well, of which the step itself is traced in another way. `host` bytes may lie
    there.
    """

    step: Step
    owners: dict[str, fx.Node]
    others: dict[str, fx.Node]
    sites: dict[str, Site]
    seconds: dict[fx.Node, float]
    alone: dict[str, float]
    proposals: Proposals
    offers: dict[fx.Node, list[Offer]]
    heads: dict[str, Site] = field(default_factory=dict[str, Site])
    host: float = float("inf")

    @property
    def droppable(self) -> frozenset[fx.Node]:
        """Owners that some rewrite may compute again."""
        return frozenset(o for o, found in self.offers.items() if any(_again(f) for f in found))

    @property
    def forms(self) -> dict[fx.Node, list[Form]]:
        """What owners may wait in instead."""
        found = {
            owner: [f.treatment for f in offers if isinstance(f.treatment, Form)]
            for owner, offers in self.offers.items()
        }
        return {owner: forms for owner, forms in found.items() if forms}

    def proposed(self, key: str) -> list[Proposal]:
        """What is proposed for a saved tensor or a head."""
        return self.proposals.by_site.get(("activation", key), [])


def saved_tensors(
    step: Step,
    model: CostModel,
    rewrites: Sequence[Rewrite],
    workload: Train,
    keep: Iterable[str],
    prior: CostModel | None = None,
    *,
    heads: Sequence[Site] = (),
    cut: Cut | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Saved:
    """Price the forward's ops and ask every rewrite about every saved tensor and head.

    In a step with heads that are `cut` a name in `keep` may be that of a tensor which is no more.
    `prior` prices the ops that nobody would run again, which need not be timed. `weights` are the
    model's parameters by name; without them no norm divides by its own.
    """
    calls = {n: op_call(n) for n in schedule(step, step.saved).runs_again()}
    seconds = {node: _seconds(model, [call]) for node, call in calls.items()}
    own = dict.fromkeys(step.owner[n] for n in step.forward if n in step.owner)
    rest = [o for o in own if o in step.forward and o not in set(step.saved)]
    keyed = _keyed([*step.saved, *rest])
    owners = dict(list(keyed.items())[: len(step.saved)])
    others = dict(list(keyed.items())[len(step.saved) :])
    again = {k: [] if step.blocked(step.maker(o)) else _runs(step, o) for k, o in owners.items()}
    norms = norms_of(step, weights or {})
    sites = {
        k: _site(step, k, o, [calls[n] for n in again[k]], norms.get(o)) for k, o in owners.items()
    }
    alone = {key: sum(seconds[n] for n in nodes) for key, nodes in again.items()}
    asked = [*sites.values(), *heads]
    keep = [name for name in keep if not cut or _is_one(name, [site.key for site in asked])]
    found = propose(asked, rewrites, scenarios(workload), workload.kind, keep)
    step.pace = _pace(step, prior or model) | seconds
    by_key = {head.key: head for head in heads}
    saved = Saved(step, owners, others, sites, seconds, alone, found, {}, by_key)
    saved.offers = {
        owners[key]: [_offer(saved, p, model, workload) for p in proposals]
        for (_, key), proposals in found.by_site.items()
        if key in owners
    }
    return saved


def _is_one(name: str, keys: Sequence[str]) -> bool:
    try:
        return bool(select(name, keys, "site"))
    except PlanError:
        return False


def _pace(step: Step, model: CostModel) -> dict[fx.Node, float]:
    """Seconds of every op of the step; views and parts of results take none."""
    return {
        n: 0.0 if n.target is operator.getitem or step.is_view(n) else _seconds(model, [op_call(n)])
        for n in (*step.forward, *step.backward)
    }


def _seconds(model: CostModel, calls: Iterable[OpCall]) -> float:
    return sum(cost.seconds for cost in map(model, calls) if cost is not None)


def _runs(step: Step, owner: fx.Node) -> list[fx.Node]:
    return schedule(step, [owner]).runs_again()


def _site(
    step: Step, key: str, owner: fx.Node, calls: Sequence[OpCall], norm: NormInfo | None
) -> Site:
    value: Tensor = owner.meta["val"]
    info = SavedInfo(
        tuple(map(int, value.shape)),
        tuple(map(int, value.stride())),
        value.dtype,
        str(value.device),
        step.bytes[owner],
        whole(value, step.bytes[owner]),
        int(owner.args[1]) if owner.target is operator.getitem else 0,  # pyright: ignore
        step.blocked(step.maker(owner)),
        tuple(calls),
        derivative_of(step, owner),
        norm,
    )
    # gradients that wait for the backward to begin are read first thing: nothing else pays
    early = info.blocked if step.maker(owner).target is EARLY else None
    return Site("activation", key, owner.name, info, op=key, blocked=early)


def _offer(saved: Saved, proposal: Proposal, model: CostModel, workload: Train) -> Offer:
    """What applying a proposal asks for, priced."""
    rewrite, match, candidate = proposal.rewrite, proposal.match, proposal.candidate
    key = proposal.site.key
    owner = saved.owners[key]
    rewrite.apply(match, candidate, {}, Marks(saved))
    mark = owner.meta.pop(MARK, None)
    if mark == AGAIN:
        return Offer(proposal, AGAIN, Cost(seconds=saved.alone[key]))
    if not isinstance(mark, Image):
        raise PlanError(f"{rewrite.name} marks {key} with {mark!r}: it takes AGAIN or an Image")
    (scenario,) = scenarios(workload)
    calls = rewrite.lower(match, candidate, scenario)
    form = _form(saved.step, owner, mark, candidate.label or rewrite.name, calls, model)
    derivative = saved.sites[key].info.derivative  # pyright: ignore
    if mark.replaces and derivative:
        # never a gain: that would be worth it without a budget
        left = form.seconds - _seconds(model, [derivative.call])
        form = replace(form, seconds=max(0.0, left))
    alone = schedule(saved.step, (), (), {owner: form}).wait + form.seconds
    return Offer(proposal, form, Cost(seconds=alone, temporary_bytes=form.bytes))


def _form(
    step: Step,
    owner: fx.Node,
    image: Image,
    label: str,
    calls: Sequence[OpCall],
    model: CostModel,
) -> Form:
    """An image, priced by the `calls` that pack and unpack it, and copy it there and back.

    A prior of its error: tensors err independently of each other, and a step that has all of its
    saved bytes rounded alike gives gradients that are off by as much as the tensors.
    """
    value: Tensor = owner.meta["val"]
    share = step.bytes[owner] / sum(step.bytes[o] for o in step.saved)
    error = share * image.rounding**2
    if image.shares:
        beside = max(call.temporary_bytes for call in calls)
        return Form(image, label, 0, 0, int(beside), _seconds(model, calls), error)
    host, here = 0, 0
    for part in waiting(image, value):
        size = part.untyped_storage().nbytes()
        there = part.device.type != value.device.type
        host, here = (host + size, here) if there else (host, here + size)
    copies = [call for call in calls if call.host_bytes]
    work = [call for call in calls if not call.host_bytes]
    runs = work if value.device.type == "cpu" else []
    packing, unpacking = map(_workspace, runs) if runs else (0, 0)
    return Form(
        image,
        label,
        here,
        packing,
        unpacking,
        _seconds(model, work),
        error,
        host,
        _seconds(model, copies) / 2,
        sum(part.nbytes for part in parts_of(image, value)) if image.pack else 0,
    )


@lru_cache
def _workspace(call: OpCall) -> int:
    """Bytes that an op takes on a CPU beside what it returns; kernels on CUDA take none."""
    if call.run is None:
        return 0
    taken = peak_live_bytes(call.run("cpu"), torch.device("cpu"))
    return taken - int(call.bytes_written)


def _again(offer: Offer) -> bool:
    return offer.treatment == AGAIN


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

    def amend(self, site: Site, node: fx.Node, change: Callable[[Tensor], Tensor]) -> None:
        raise _refusal(site, "change a tensor")

    def call(
        self, site: Site, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node:
        raise _refusal(site, "insert a call")

    def replace(self, site: Site, new: fx.Node) -> None:
        raise _refusal(site, "replace a node")

    def update(self, site: Site, **arguments: Any) -> None:
        raise _refusal(site, "change arguments")


def _refusal(site: Site, what: str) -> PlanError:
    return PlanError(
        f"{site.key}: a rewrite asked to {what} in a training step, where rewrites mark what is "
        "computed again; leave the rewrite out with rewrites="
    )
