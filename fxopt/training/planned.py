"""From a module and inputs to a planned step that runs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import no_python_dispatcher
from torch._ops import OpOverload
from torch.utils._python_dispatch import (
    _disable_current_modes,  # pyright: ignore[reportPrivateUsage]
)

from ..cost_models.hardware import host_memory, probe
from ..cost_models.measured import Measured
from ..ir.errors import PlanError
from ..ir.plan import Decision, Plan
from ..ir.rewrite import Rewrite
from ..ir.workload import Train
from .capture import joint
from .emit import executable, partition
from .forms import Choices, Treatment
from .heads import Cut, HeadCut
from .measure import device_of
from .module import Inputs, Run
from .remembered import remembered
from .schedule import Schedule
from .search import StepPlan, laid_out
from .sites import Saved, saved_tensors
from .step import Step, node_key
from .watched import Probe
from .workspaces import workspaces

HOST_SHARE = 0.5
"""Of what the host can still give, the most that a plan may take."""

Pick = Callable[[Saved, float], StepPlan]
"""Takes the saved tensors and a deadline (of `time.monotonic`), gives the plan to run."""


@dataclass(frozen=True)
class Request:
    """What is asked of every step, whatever its inputs."""

    workload: Train
    rewrites: tuple[Rewrite, ...]
    keep: tuple[str, ...]
    time_limit: float | None


@dataclass(frozen=True)
class Layout:
    """How a planned step came about. `widest` is the op at which its peak stands, `structure`
    names the traced graph, `probe` can watch the step that runs; errors were found to be `scale`
    times what the prior says."""

    saved: Saved
    plan: StepPlan
    calls: Schedule
    widest: str
    structure: str
    probe: Probe
    cut: Cut = field(default_factory=dict[str, HeadCut])
    """How the losses of heads are computed without logits, by the key of the head."""
    scale: float = 1.0

    @property
    def error(self) -> float:
        """The relative error of the gradients that is expected."""
        return self.scale * self.plan.error


def planned(
    model: nn.Module, inputs: Inputs, request: Request, pick: Pick, cut: Cut
) -> tuple[Run, Layout]:
    """Trace the step of `model` in its present modes, pick a plan and lay it out.

    The losses of the heads in `cut` are computed without logits.
    """
    found: list[Layout] = []
    probe = Probe()
    deadline = time.monotonic() + (request.time_limit or float("inf"))

    def halves(graph: fx.GraphModule, count: int) -> tuple[fx.GraphModule, fx.GraphModule]:
        step = Step.of(graph.graph, count)
        structure = _structure(step)
        with _disable_current_modes(), no_python_dispatcher():
            costs = costs_of(model)
            if device_of(model).type == "cuda":  # on a CPU kernels take next to nothing
                step.temporary = workspaces(step, device_of(model))
            saved = saved_tensors(
                step, costs, request.rewrites, request.workload, request.keep, costs.prior,
                heads=traced.heads, cut=cut, weights=dict(model.named_parameters()),
            )  # fmt: skip
            saved.host = HOST_SHARE * host_memory()
            costs.save()
        plan = pick(saved, deadline)
        calls = laid_out(step, plan)
        nodes = (*step.forward, *step.backward)
        widest = node_key(nodes[int(calls.live().argmax())])
        found.append(Layout(saved, plan, calls, widest, structure, probe, cut))
        return partition(graph, calls, count)

    with joint(model, inputs, cut) as traced:
        run = traced.build(halves, partial(executable, probe=probe))
    return run, found[0]


def fastest(limit: float, error: float = 0.0) -> Pick:
    """The fastest plan whose peak is below `limit` bytes, else the one with the lowest peak; of
    those from which no larger error than `error` is expected."""

    def pick(saved: Saved, deadline: float) -> StepPlan:
        plans = remembered(
            saved.step, saved.seconds, saved.droppable, saved.forms,
            error=error, host=saved.host, deadline=deadline,
        )  # fmt: skip
        return next((p for p in plans if p.peak <= limit), plans[-1])

    return pick


def as_decided(plan: Plan) -> Pick:
    """What `plan` says of each saved tensor; PlanError where it speaks of other tensors."""

    def pick(saved: Saved, deadline: float) -> StepPlan:
        known = {**saved.owners, **saved.others}
        said = {d.key: d for d in plan.decisions if d.key not in saved.heads}
        missing = [key for key in saved.owners if key not in said]
        unknown = [key for key in said if key not in known]
        if missing or unknown:
            raise PlanError(
                f"the plan was made for another step: it says nothing of {missing[:3]} and speaks "
                f"of {unknown[:3]}; make it again with fxopt.plan for this model and these inputs"
            )
        choices: Choices = {known[k]: _treatment(saved, d) for k, d in said.items() if d.rewritten}
        stops = frozenset(saved.others[k] for k in said if k in saved.others)
        made = StepPlan(choices, stops).counted(saved.step, saved.seconds)
        _check_starts(saved, made)
        return made

    return pick


def _treatment(saved: Saved, decision: Decision) -> Treatment:
    """What a decision asks for."""
    offers = saved.offers.get(saved.owners.get(decision.key), [])  # pyright: ignore
    wanted = decision.rewrite, decision.label
    found = next((offer.treatment for offer in offers if offer.name == wanted), None)
    if found is None:
        offered = [" ".join(offer.name).strip() for offer in offers]
        raise PlanError(
            f"the plan says {' '.join(wanted).strip()} of {decision.key}, where this step offers "
            f"{', '.join(offered) or 'nothing'}; make the plan again, or choose another there"
        )
    return found


def _check_starts(saved: Saved, plan: StepPlan) -> None:
    """PlanError where ops would run again from memory that does not come back as it was."""
    rounded = {owner for owner, form in plan.images.items() if not form.restores}
    found = laid_out(saved.step, plan).starts() & rounded
    if found:
        names = [key for key, owner in saved.owners.items() if owner in found]
        raise PlanError(
            f"the plan rounds {names[:3]}, or keeps but a derivative, and computes other tensors "
            "again from there: their error would grow unseen; keep one or the other"
        )


def costs_of(model: nn.Module) -> Measured:
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return Measured(probe(device_of(model)), str(dtype).removeprefix("torch."))


def _structure(step: Step) -> str:
    """SHA-256 over the ops of a step and the shapes and dtypes of what they make."""
    digest = hashlib.sha256()
    for node in (*step.forward, *step.backward):
        value = node.meta.get("val")
        shape = f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
        target: Any = node.target
        name = str(target) if isinstance(target, OpOverload) else target.__name__
        digest.update(f"{name}|{shape}\n".encode())
    return digest.hexdigest()
