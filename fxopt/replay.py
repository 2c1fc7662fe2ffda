"""Realising a plan that was made before: checks, prepared tensors, no search."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .compiler import Compiler
from .decide.propose import Proposal
from .hosted import Optimized
from .ir.errors import PlanError
from .ir.plan import Decision, Plan
from .ir.rewrite import Candidate, Refusal
from .ir.site import Site
from .show.report import Report


def prepared_tensors(compiler: Compiler, proposals: Iterable[Proposal]) -> dict[str, Tensor]:
    """What calibrated choices prepared, by "<family>:<key>:<name>"."""
    return {
        f"{p.site.family}:{p.site.key}:{name}": tensor
        for p in proposals
        for name, tensor in compiler.preparer(p).items()
    }


def replay(compiler: Compiler, plan: Plan, *, refit: bool) -> Optimized:
    """The module of `plan`; PlanError when it is for another model."""
    check(compiler, plan, refit=refit)
    sites = {(site.family, site.key): site for site in compiler.captured.sites}
    proposals = [_proposal(compiler, sites, decision) for decision in plan.rewritten]

    def tensors(proposal: Proposal) -> dict[str, Tensor]:
        prefix = f"{proposal.site.family}:{proposal.site.key}:"
        stored = {
            name.removeprefix(prefix): tensor.to(compiler.device)
            for name, tensor in plan.tensors.items()
            if name.startswith(prefix)
        }
        return stored if stored and not refit else compiler.preparer(proposal)

    module = compiler.emit(compiler.realise(proposals, tensors))
    module.plan = plan
    module.report = Report(list(plan.totals), [*plan.notes, "replayed: not measured again"])
    return module


def check(compiler: Compiler, plan: Plan, *, refit: bool) -> None:
    """PlanError unless the plan fits this model and the installed rewrites."""
    plan.check_rewrites({rewrite.name: rewrite.version for rewrite in compiler.rewrites})
    if plan.fingerprint_structure != compiler.structure:
        raise PlanError(
            "the plan was made for another model: names, ops, shapes or dtypes differ; make a "
            "plan for this one with fxopt.plan"
        )
    if plan.tensors and not refit and plan.fingerprint_weights != compiler.weights:
        raise PlanError(
            "the plan's prepared tensors belong to other weights of this architecture; pass "
            "refit=True and calibration data to fit them to these"
        )


def check_tensors(opt: Optimized, replayed: Optimized) -> None:
    """PlanError unless `opt` holds what its plan gives: then what is measured of one holds of
    the other."""
    mine, its = opt.state_dict(), replayed.state_dict()
    differing = [n for n in {**mine, **its} if n not in mine or n not in its]
    differing += [n for n in mine if n in its and not _alike(mine[n], its[n])]
    if differing:
        raise PlanError(
            f"the module is not what its plan gives: {', '.join(differing[:3])} "
            f"differ{'s' if len(differing) == 1 else ''}. It was trained or edited since, or the "
            "plan's .safetensors is missing: optimise or apply again"
        )


def _alike(mine: Tensor, its: Tensor) -> bool:
    if mine.shape != its.shape or mine.dtype != its.dtype:
        return False
    if not mine.is_floating_point():
        return torch.equal(mine, its.to(mine.device))
    return torch.allclose(mine.float(), its.to(mine.device).float(), rtol=1e-3, equal_nan=True)


def _proposal(
    compiler: Compiler, sites: dict[tuple[str, str], Site], decision: Decision
) -> Proposal:
    site = sites.get((decision.family, decision.key))
    if site is None:
        raise PlanError(f"the model has no {decision.family} site {decision.key!r}")
    rewrite = next(r for r in compiler.rewrites if r.name == decision.rewrite)
    match = rewrite.match(site)
    if isinstance(match, Refusal):
        raise PlanError(f"{decision.rewrite} does not serve {decision.key!r}: {match.reason}")
    candidate = Candidate(decision.rewrite, decision.label, decision.parameters)
    return Proposal(site, rewrite, match, candidate)
