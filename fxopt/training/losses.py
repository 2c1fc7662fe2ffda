"""What a plan says of the logits of losses."""

from __future__ import annotations

from typing import Any

from ..decide.propose import Proposal
from ..ir.cost import Cost
from ..ir.plan import KEEP, Alternative, Decision
from ..ir.rewrite import element_size
from ..ir.site import LossHeadInfo, Site
from ..ir.units import format_value
from ..passes.activation.cut_cross_entropy import filter_eps
from .planned import Layout


def head_decisions(layout: Layout) -> list[Decision]:
    """One decision for each head that some rewrite serves or the caller keeps."""
    saved = layout.saved
    asked = [s for s in saved.heads.values() if saved.proposed(s.key) or _kept(layout, s)]
    return [_cut(layout, s) if s.key in layout.cut else _whole(layout, s) for s in asked]


def head_notes(layout: Layout) -> list[str]:
    """Logits that the model returns and the planned step does not."""
    return [
        f"{key}: the step returns None for these logits, which a plan without them does not make; "
        f"keep={key!r} keeps them"
        for key in layout.cut
        if _info(layout.saved.heads[key]).returned
    ]


def _cut(layout: Layout, site: Site) -> Decision:
    head, info = layout.cut[site.key], _info(site)
    proposals = layout.saved.proposed(site.key)
    wanted = head.chunk, head.filter_eps
    chosen = next(p for p in proposals if (_chunk(p), filter_eps(p.candidate)) == wanted)
    reason = (
        f"{_size(_bytes(info))} of logits are not stored, nor their gradient: "
        f"{head.chunk} of {info.rows} rows at a time; within rounding of the original"
    )
    reason += "; the step returns None in place of the logits" if info.returned else ""
    if head.filter_eps:
        reason += f"; classes whose gradient is below {head.filter_eps:.2g} share one product"
    others = [_alternative(p, "slower, or too large") for p in proposals if p is not chosen]
    keep = Alternative(
        rewrite=KEEP,
        cost=Cost(temporary_bytes=_bytes(info)),
        error=0.0,
        reason="more bytes, or more seconds to make room for them",
    )
    return Decision(
        key=site.key,
        family="activation",
        rewrite=chosen.rewrite.name,
        version=chosen.rewrite.version,
        label=chosen.candidate.label,
        parameters=dict(chosen.candidate.parameters),
        cost=Cost(seconds=head.seconds, temporary_bytes=_workspace(chosen)),
        error=layout.scale * head.error,
        reason=reason,
        alternatives=[keep, *others],
    )


def _whole(layout: Layout, site: Site) -> Decision:
    refused = layout.saved.proposals.refused.get(("activation", site.key))
    loose = "the budget holds without it, to the last bit and with logits to return"
    if refused:
        reason = refused[0][1]
    else:
        reason = loose if not layout.plan.choices else "what runs again makes room for less"
    return Decision(
        key=site.key,
        family="activation",
        cost=Cost(temporary_bytes=_bytes(_info(site))),
        error=0.0,
        reason=reason,
        alternatives=[_alternative(p, reason) for p in layout.saved.proposed(site.key)],
        locked=_kept(layout, site),
    )


def _alternative(proposal: Proposal, reason: str) -> Alternative:
    return Alternative(
        rewrite=proposal.rewrite.name,
        version=proposal.rewrite.version,
        label=proposal.candidate.label,
        parameters=dict(proposal.candidate.parameters),
        cost=Cost(temporary_bytes=_workspace(proposal)),
        error=0.0,
        reason=reason,
    )


def _kept(layout: Layout, site: Site) -> bool:
    return ("activation", site.key) in layout.saved.proposals.kept


def _workspace(proposal: Proposal) -> int:
    info = _info(proposal.site)
    return min(_chunk(proposal), info.rows) * info.classes * element_size(info.dtype)


def _chunk(proposal: Proposal) -> int:
    return int(proposal.candidate.parameters["chunk"])


def _bytes(info: LossHeadInfo) -> int:
    return info.rows * info.classes * element_size(info.dtype)


def _info(site: Site) -> LossHeadInfo:
    assert isinstance(site.info, LossHeadInfo)
    return site.info


def _size(value: Any) -> str:
    return format_value(value, "bytes")
