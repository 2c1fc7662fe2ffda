"""Recovery without training: linears fitted to the inputs that a rewritten model gives them.

A projection is made for the inputs of the original. Behind other rewrites its inputs differ, and
part of the difference can be made up for: the linear map of the new inputs x' that is nearest to
the original's outputs W x is W' = W E[x x'T] E[x' x'T]^-1, and E‖W x - V x'‖² is a constant plus
E‖(W' - V) x'‖². So every rewrite fits as before, to W' and the gram of x'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from ..ir.patches import from_rows, to_rows
from ..ir.site import EmbeddingInfo, ExpertsInfo, GroupInfo, LinearInfo, Site
from .calibration import Batch, padding_of
from .propose import Prepare, Proposal, Remade
from .quality import Quality
from .recorder import Run
from .statistics import Recorded, Statistics
from .walk import Walk

DAMPING = 3.0
"""Times features a row, of the mean energy of an input: how much W' is held to W. Little of it
lowers the error on the rows that it is fitted to, and raises it on others where they are few."""


@dataclass
class Recovery(Remade):
    """Tensors by proposal, for `Compiler.realise`: those fitted again where that helped.

    `errors` has, by site key, E‖y - ŷ‖² / E‖y‖² of the site's output behind the rewritten sites
    before it: with the tensors as they were, and as they are.
    """

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


def recover(
    original: fx.GraphModule,
    rewritten: fx.GraphModule,
    proposals: Iterable[Proposal],
    batches: Sequence[Batch],
    run: Run,
    quality: Quality,
    statistics: Statistics,
    prepare: Prepare,
) -> Recovery:
    """Fit the linear `proposals` again, in the order of the graph.

    `rewritten` is `original` with the rewrites of the other families, its linears untouched.
    `prepare` gives the tensors to start from. Both graphs are walked once, all `batches` together,
    and hold what is alive at one node for all of them. A weight that embeddings read too is not
    fitted: they have no inputs to fit to. Experts stand as in `rewritten`.
    """
    linear = [
        p
        for p in proposals
        if p.site.family == "linear" and not isinstance(p.site.info, ExpertsInfo)
    ]
    at = {site.node: (p, k, site) for p in linear for k, site in _outputs(p)}
    recovery = Recovery(prepare)
    walks = [Walk(graph, batches, run, quality) for graph in (original, rewritten)]
    masks = [padding_of(batch) for batch in batches]
    statistics.passes(p.site for p in linear)
    with torch.no_grad():
        for node in [n.name for n in rewritten.graph.nodes if n.name in at]:
            proposal, member, site = at[node]
            before, after = ([_input(x, site) for x in walk.inputs(site)] for walk in walks)
            if proposal.site.key not in recovery.errors and not _tied(proposal.site):
                pairs = list(zip(_rows(before, masks), _rows(after, masks), strict=True))
                _fit(recovery, proposal, member, pairs, statistics)
            walks[0].proceed()
            tensors = recovery(proposal)
            outputs = [_emulated(proposal, tensors, x, member) for x in after]
            walks[1].proceed([from_rows(y, _patch(site)) for y in outputs])
    return recovery


def _outputs(proposal: Proposal) -> list[tuple[int, Site]]:
    info = proposal.site.info
    if not isinstance(info, GroupInfo):
        return [(0, proposal.site)]
    return [(k, info.members[k]) for k in info.outputs]


def _tied(site: Site) -> bool:
    return isinstance(site.info, GroupInfo) and site.info.kind == "tied"


def _input(x: Tensor, site: Site) -> Tensor:
    """A site's input as rows; indices are rows of one number."""
    return x[..., None] if isinstance(site.info, EmbeddingInfo) else to_rows(x, _patch(site))


def _patch(site: Site) -> tuple[int, ...]:
    return site.info.patch if isinstance(site.info, LinearInfo) else ()


def _rows(inputs: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tensor]:
    """The unpadded rows of each sequence."""
    flat = [x.reshape(-1, x.shape[-1]) for x in inputs]
    return [
        rows if mask is None or len(rows) != mask.numel() else rows[mask.flatten()]
        for rows, mask in zip(flat, masks, strict=True)
    ]


def _fit(
    recovery: Recovery,
    proposal: Proposal,
    member: int,
    pairs: Sequence[tuple[Tensor, Tensor]],
    statistics: Statistics,
) -> None:
    recorded = statistics.at(proposal.site)
    gram = torch.stack([new.double().T @ new.double() for _, new in pairs]).sum(0)
    lost = torch.stack([(x - new).double().T @ new.double() for x, new in pairs]).sum(0)
    rows = sum(len(new) for _, new in pairs)
    ridge = DAMPING * len(gram) / max(rows, 1) * gram.diagonal().mean().clamp_min(1e-300)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    change = torch.linalg.solve(gram + ridge * eye, lost, left=False)
    shifted = _shifted(recorded, change, gram, rows, proposal.site)
    fitted = proposal.rewrite.prepare(proposal.match, proposal.candidate, shifted)
    first = recovery.prepare(proposal)
    errors = [_error(proposal, t, member, pairs, recorded) for t in (first, fitted)]
    if errors[1] < errors[0]:
        recovery.anew[proposal.where] = fitted
    recovery.errors[proposal.site.key] = (errors[0], min(errors))


def _shifted(recorded: Recorded, change: Tensor, gram: Tensor, rows: int, site: Site) -> Recorded:
    """The statistics of W' on the new inputs: those of `change`, W' = W + W change. In a group
    that ends in one output, its other members keep their weights."""

    def moved(one: Recorded) -> Recorded:
        assert one.weight is not None
        weight = one.weight.double() @ change + one.weight.double()
        weight = weight.to(one.weight.dtype)
        return replace(one, weight=weight, gram_sum=gram, gram_rows=rows, made={})

    if not isinstance(site.info, GroupInfo):
        return moved(recorded)
    outputs = site.info.outputs
    members = [moved(m) if k in outputs else m for k, m in enumerate(recorded.members)]
    return replace(moved(recorded), members=tuple(members))


def _error(
    proposal: Proposal,
    tensors: Mapping[str, Tensor],
    member: int,
    pairs: Sequence[tuple[Tensor, Tensor]],
    recorded: Recorded,
) -> float:
    one = recorded.members[member] if recorded.members else recorded
    off = total = 0.0
    for x, new in pairs:
        y = replace(one, inputs={"x": x}).exact()
        off += (_emulated(proposal, tensors, new, member) - y).double().square().sum().item()
        total += y.double().square().sum().item()
    return off / total if total > 0 else 0.0


def _emulated(proposal: Proposal, tensors: Mapping[str, Tensor], x: Tensor, member: int) -> Tensor:
    inputs = {"x": x, "member": member}
    return proposal.rewrite.emulate(proposal.match, proposal.candidate, tensors, inputs)
