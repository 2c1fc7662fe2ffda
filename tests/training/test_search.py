"""The choice: no budget brings a higher peak than a larger one, and small steps are optimal."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxopt.training import offers, remembered
from fxopt.training.capture import joint
from fxopt.training.emit import executable, partition
from fxopt.training.planned import fastest
from fxopt.training.schedule import schedule
from fxopt.training.search import StepPlan, frontier
from fxopt.training.segments import cuts
from fxopt.training.step import Step, node_key
from tests.training.test_images import saved_of

Example = tuple[nn.Module, dict[str, Any]]


def taken_apart(example: Example) -> Step:
    """The step of a model, its graph as it was traced."""
    found: list[Step] = []

    def cut(graph: fx.GraphModule, count: int) -> tuple[fx.GraphModule, fx.GraphModule]:
        found.append(Step.of(graph.graph, count))
        return partition(fx.GraphModule(graph, graph.graph), schedule(found[0], ()), count)

    with joint(*example) as traced:
        traced.build(cut, executable)
    return found[0]


def made_up_seconds(step: Step) -> dict[fx.Node, float]:
    """Bytes read and written, as on a device that is bound by memory."""
    return {n: 1e-9 * (1 + step.bytes.get(step.owner.get(n, n), 0)) for n in step.forward}


def droppable(step: Step) -> frozenset[fx.Node]:
    return frozenset(o for o in step.saved if step.blocked(step.maker(o)) is None)


def plans_of(step: Step) -> list[StepPlan]:
    return frontier(step, made_up_seconds(step), droppable(step))


def test_smaller_budgets_bring_smaller_peaks(example: Example) -> None:
    step = taken_apart(example)
    plans = plans_of(step)
    full = schedule(step, ()).live().max()
    assert plans[0].peak == full
    assert plans[0].seconds == 0
    assert plans[-1].peak < 0.97 * full
    taken = [
        next((p for p in plans if p.peak <= limit), plans[-1])
        for limit in torch.linspace(plans[-1].peak, full, 20).tolist()
    ]
    for small, large in itertools.pairwise(taken):
        assert small.peak <= large.peak
        assert small.seconds >= large.seconds
    for plan in plans:
        laid = schedule(step, plan.dropped, plan.stops)
        assert plan.peak == laid.live().max()
        assert plan.seconds == pytest.approx(
            sum(made_up_seconds(step)[n] for n in laid.runs_again())
        )


def test_a_frontier_is_near_that_of_all_subsets() -> None:
    layers = [nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 4)]
    model, inputs = nn.Sequential(*layers), {"input": torch.randn(512, 16)}
    step = taken_apart((model, inputs))
    seconds, sites = made_up_seconds(step), list(droppable(step))
    assert 3 <= len(sites) <= 8
    every = [
        (schedule(step, dropped).live().max(), sum(seconds[n] for n in again.runs_again()))
        for count in range(len(sites) + 1)
        for dropped in itertools.combinations(sites, count)
        for again in [schedule(step, dropped)]
    ]
    plans = plans_of(step)
    for limit, _ in every:
        best = min(s for peak, s in every if peak <= limit)
        mine = next((p.seconds for p in plans if p.peak <= limit), None)
        if mine is not None:
            assert mine <= 1.15 * best + 1e-12
    assert plans[-1].peak <= 1.02 * min(peak for peak, _ in every)


def test_a_limit_takes_the_fastest_plan_below_it(small: Example) -> None:
    step = taken_apart(small)
    plans = plans_of(step)
    middle = plans[len(plans) // 2]

    class Saved:
        pass

    saved: Any = Saved()
    saved.step, saved.seconds, saved.droppable = step, made_up_seconds(step), droppable(step)
    saved.forms, saved.host = {}, float("inf")
    assert fastest(middle.peak)(saved, float("inf")) == middle
    assert fastest(middle.peak - 1)(saved, float("inf")).peak < middle.peak
    assert fastest(0)(saved, float("inf")) == plans[-1]


def test_cuts_lie_between_layers(example: Example) -> None:
    model, _ = example
    step = taken_apart(example)
    found = cuts(step)
    assert found == sorted(found, key=lambda cut: cut.position)
    depth = sum(1 for m in model.modules() if isinstance(m, nn.LayerNorm | nn.Conv2d))
    assert len(found) >= max(depth - 1, 3)
    for cut in found:
        later = {s for n in step.forward[cut.position :] for s in n.all_input_nodes}
        crossing = {
            step.owner[n] for n in step.forward[: cut.position] if n in later and n in step.owner
        }
        assert {o for o in crossing if o in step.active and o.op != "placeholder"} == {cut.owner}


def test_layers_that_repeat_keep_what_they_start_from() -> None:
    """Were the layers' outputs dropped, the last one's second run would run all layers."""
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.GELU(), nn.SiLU()) for _ in range(12)]
    step = taken_apart((nn.Sequential(*layers), {"input": torch.randn(512, 64)}))
    plans, everything = plans_of(step), schedule(step, droppable(step)).live().max()
    assert everything > 0.95 * plans[0].peak
    assert plans[-1].peak < 0.65 * plans[0].peak
    assert len({node_key(o) for o in step.saved} - {node_key(o) for o in plans[-1].dropped}) >= 2


@pytest.mark.parametrize("depth", [4, 8])
def test_layers_that_repeat_are_solved_for_once(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.GELU(), nn.SiLU())] * depth
    step = taken_apart((nn.Sequential(*layers), {"input": torch.randn(512, 64)}))
    stops = frozenset(step.saved[::4])
    asked: list[int] = []
    original = offers._cheapest

    def counted(*args: Any) -> list[tuple[int, ...]]:
        asked.append(1)
        return original(*args)

    monkeypatch.setattr(offers, "_cheapest", counted)
    offered = offers.Offers(step, made_up_seconds(step), droppable(step), {})
    known: offers.Known = {}
    sites = [o for o in step.saved if o not in stops]
    size = len(sites) // depth
    plans = [offered.plans(sites[i : i + size], stops, known) for i in range(0, size * depth, size)]
    assert len(asked) <= 3
    assert {len(each) for each in plans[1:-1]} == {len(plans[1])}


@pytest.mark.slow
def test_another_budget_is_answered_from_memory(
    small: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []
    original = remembered.frontier

    def counted(*args: Any, **kwargs: Any) -> list[StepPlan]:
        searched.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(remembered, "frontier", counted)
    monkeypatch.setattr(remembered, "_known", {})

    def asked(scale: float, forms: bool = True) -> list[Any]:
        step = taken_apart(small)
        saved = saved_of(step)
        seconds = {node: scale * s for node, s in saved.seconds.items()}
        offered = saved.forms if forms else {}
        plans = remembered.remembered(step, seconds, saved.droppable, offered, error=0.1)
        for plan in plans:
            assert plan == plan.counted(step, seconds)
        return [{o.name: getattr(t, "label", t) for o, t in p.choices.items()} for p in plans]

    first = asked(1.0)
    assert asked(1.0) == first
    assert len(searched) == 1
    assert any(label != "again" for said in first for label in said.values())
    asked(2.0)
    asked(1.0, forms=False)
    assert len(searched) == 3
    asked(1.0)
    assert len(searched) == 3
