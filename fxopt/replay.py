"""Realising a plan that was made before: checks, prepared tensors, no search."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import passes
from .compiler import Compiler
from .decide.propose import Prepare, Proposal, Remade, candidates
from .decide.statistics import OnDemand
from .distilled import SAID, distilled, too_few
from .emit.module import OptimizedModule
from .emit.targets import written
from .hosted import Optimized
from .ir.errors import PlanError
from .ir.plan import Decision, Plan
from .ir.rewrite import Refusal
from .ir.site import Site
from .ir.units import format_value

logger = logging.getLogger("fxopt")

NAMED = 4
"""Sites that a note names; of more it says how many there are."""


def installed(plan: Plan) -> list[str]:
    """The rewrites that `plan` uses, those on request included, as far as they are installed."""
    known = passes.available()
    return sorted({d.rewrite for d in plan.rewritten if d.rewrite in known})


def prepared_tensors(proposals: Iterable[Proposal], prepare: Prepare) -> dict[str, Tensor]:
    """What calibrated choices prepared, by the choice and the tensor's name."""
    return {
        f"{_choice(proposal)}:{name}": tensor
        for proposal in proposals
        for name, tensor in prepare(proposal).items()
    }


def _choice(proposal: Proposal) -> str:
    """A site and what becomes of it, so that no tensor is taken for one of another choice."""
    site, values = proposal.site, sorted(proposal.candidate.parameters.items())
    given = ",".join(f"{name}={value}" for name, value in values)
    return f"{site.family}:{site.key}:{proposal.rewrite.name}({given})"


def replay(compiler: Compiler, plan: Plan, *, refit: bool) -> Optimized:
    """The module of `plan`; PlanError when it is for another model."""
    check(compiler, plan, refit=refit)
    sites = {(site.family, site.key): site for site in compiler.captured.sites}
    proposals = [_proposal(compiler, sites, decision) for decision in plan.rewritten]
    stored: dict[str, dict[str, Tensor]] = {}
    for key, tensor in ({} if refit else plan.tensors).items():
        choice, _, name = key.rpartition(":")
        stored.setdefault(choice, {})[name] = tensor
    fitted: dict[str, Mapping[str, Tensor]] = {}

    def fit(proposal: Proposal) -> Mapping[str, Tensor]:
        choice = _choice(proposal)
        if choice not in fitted:
            recorded: Any = OnDemand(compiler.statistics, proposal.site)
            made = proposal.rewrite.prepare(proposal.match, proposal.candidate, recorded)
            fitted[choice] = made
        return fitted[choice]

    def moved(found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: tensor.to(compiler.device) for name, tensor in found.items()}

    known = [(p, stored.get(_choice(p))) for p in proposals]
    tensors = Remade(fit, {p.where: moved(found) for p, found in known if found})
    again = None
    if plan.recover is not None and not stored and not too_few(compiler):
        again = distilled(compiler, proposals, plan.recover, tensors)
    module = compiler.emit(compiler.realise(proposals, again or tensors))
    module.plan = plan
    keys = [p.site.key for p in proposals if fitted.get(_choice(p))]
    notes = _fitting(keys, "refit=True" if refit else _why_fitted(plan), compiler)
    if keys and plan.recover is not None:
        notes.append(f"distilled again: {again.said}" if again else _undistilled(compiler))
    module.report = plan.report("replayed: not measured again", *notes)
    if keys or stored.keys() - set(map(_choice, proposals)):
        # what is said of the plan's own tensors does not hold of these
        module.report.notes = [n for n in module.report.notes if not n.startswith(SAID)]
        module.report.distilled = again.outcome.blocks if again else []
    return module


def _undistilled(compiler: Compiler) -> str:
    reason = too_few(compiler) or "the plan holds distilled tensors of the other choices"
    return f"not distilled again: {reason}"


def _why_fitted(plan: Plan) -> str:
    if not plan.tensors:
        return "no prepared tensors came with the plan"
    return "the plan holds other choices there"


def _fitting(fitted: list[str], why: str, compiler: Compiler) -> list[str]:
    """What the report says of tensors that were not the plan's."""
    if not fitted:
        return []
    more = f" and {len(fitted) - NAMED} more" if len(fitted) > NAMED else ""
    notes = [f"fitted again, as {why}: {', '.join(fitted[:NAMED])}{more}"]
    if not compiler.request.calibration.given:
        notes.append("calibration: none given, so these were fitted to the example inputs")
        logger.warning("%s; %s", *notes)
    return notes


def check(compiler: Compiler, plan: Plan, *, refit: bool) -> None:
    """PlanError unless the plan fits this model and the installed rewrites."""
    plan.check_rewrites({rewrite.name: rewrite.version for rewrite in compiler.rewrites})
    if plan.fingerprint_structure != compiler.structure:
        raise PlanError(
            f"the plan was made for another model: {_difference(compiler, plan)}; make a plan for "
            "this one with fxopt.plan, or load the model as it was for that one"
        )
    _check_apart(plan)
    if plan.tensors and not refit and plan.fingerprint_weights != compiler.weights:
        raise PlanError(
            "the plan's prepared tensors belong to other weights of this architecture; pass "
            "refit=True and calibration data to fit them to these"
        )


def _difference(compiler: Compiler, plan: Plan) -> str:
    """In what a model differs from that of a plan, as far as the plan tells."""
    sites = {site.key for site in compiler.captured.sites}
    missing = [d.key for d in plan.decisions if d.key not in sites]
    if missing:
        return f"this one has no {missing[0]}"
    before, now = plan.baseline.get("weights", 0.0), float(compiler.kept_weights)
    if before and before != now:
        dtypes = {str(p.dtype) for p in compiler.request.model.parameters()}
        return (
            f"its weights took {format_value(before, 'bytes')} and take "
            f"{format_value(now, 'bytes')} here, in {' and '.join(sorted(dtypes))}: another dtype, "
            "or other sizes"
        )
    return "ops, shapes or dtypes differ"


def _check_apart(plan: Plan) -> None:
    """PlanError where two decisions rewrite one linear: alone, or as one of a group."""
    rewritten: dict[str, str] = {}
    for decision in plan.rewritten:
        for key in (decision.members or [decision.key]) if decision.family == "linear" else ():
            if key in rewritten:
                raise PlanError(
                    f"{decision.key}: {decision.rewrite} needs {key} as it was, but the decision "
                    f"for {rewritten[key]} rewrites it; keep one of the two"
                )
            rewritten[key] = decision.key


def check_tensors(opt: Optimized, replayed: Optimized) -> None:
    """PlanError unless `opt` holds what its plan gives: then what is measured of one holds of
    the other."""
    mine, its = opt.state_dict(), replayed.state_dict()
    for name in _moving(opt):
        its[name] = mine.get(name, its.get(name))
    differing = [n for n in {**mine, **its} if n not in mine or n not in its]
    differing += [n for n in mine if n in its and not _alike(mine[n], its[n])]
    if differing:
        raise PlanError(
            f"the module is not what its plan gives: {', '.join(differing[:3])} "
            f"differ{'s' if len(differing) == 1 else ''}. It was trained or edited since, or the "
            "plan's .safetensors is missing: optimise or apply again"
        )


def _moving(opt: Optimized) -> list[str]:
    """Names in the state of `opt` of the buffers that its forward writes to."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in opt.named_modules()
        if isinstance(module, OptimizedModule)
        for name in written(module.graph)
    ]


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
    offered = candidates(rewrite, match, (*compiler.scenarios, compiler.final))
    found = next((c for c in offered if dict(c.parameters) == decision.parameters), None)
    if found is None:
        raise PlanError(
            f"{decision.rewrite} does not offer {decision.parameters} at {decision.key!r}; it "
            f"offers {', '.join(c.label for c in offered) or 'nothing there'}"
        )
    return Proposal(site, rewrite, match, found)
