"""What the rewrites of groups of linear layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxopt.ir.errors import PlanError
from fxopt.ir.rewrite import Editor, Match, Refusal, SiteStatistics
from fxopt.ir.site import GroupInfo, LinearInfo, Site
from fxopt.passes.linear import dense


def group_info(match: Match) -> GroupInfo:
    """The facts of a matched group."""
    info = match.site.info
    assert isinstance(info, GroupInfo)
    return info


def infos(match: Match) -> list[LinearInfo]:
    """The facts of each member."""
    return [dense.linear_info(Match(site)) for site in group_info(match).members]


def refusal(site: Site, kind: str) -> Refusal | None:
    """Why the members may not be decided together, if they may not."""
    if not isinstance(site.info, GroupInfo) or site.info.kind != kind:
        return Refusal(f"{site.family} site: the rewrite serves groups of linear layers")
    for member in site.info.members:
        if reason := dense.refusal(member):
            return Refusal(f"{member.key}: {reason.reason}")
    dtypes = {info.dtype for info in infos(Match(site))}
    if len(dtypes) > 1:
        return Refusal(f"the members' dtypes differ: {', '.join(sorted(map(str, dtypes)))}")
    return None


def stacked(match: Match) -> LinearInfo:
    """The members of one input as one layer."""
    members = infos(match)
    return replace(members[0], out_features=sum(m.out_features for m in members), bias=None)


def biases(members: Sequence[SiteStatistics]) -> dict[str, Any]:
    """The members' biases for `emulate`, as "bias0", "bias1", ..."""
    given = {f"bias{k}": m.bias for k, m in enumerate(members) if m.bias is not None}
    return {name: bias.detach() for name, bias in given.items()}


def nodes(match: Match, rewrite: str, editor: Editor) -> list[fx.Node]:
    """The members' nodes; PlanError where another rewrite has changed one."""
    found = [editor.node(member) for member in group_info(match).members]
    for member, node in zip(group_info(match).members, found, strict=True):
        if node.target is not torch.ops.aten.linear.default or node.meta.get("fxopt"):
            raise PlanError(
                f"{match.site.key}: {rewrite} needs {member.key} as it was, but another decision "
                "of this plan rewrites it; keep one of the two"
            )
    return found
