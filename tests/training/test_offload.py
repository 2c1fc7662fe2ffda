"""Saved tensors that wait in host memory: what the link decides, reasons, replay, the device."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxopt
from fxopt.ir.cost import Cost
from fxopt.ir.rewrite import Candidate, Match, Refusal
from fxopt.ir.saved import Image
from fxopt.ir.site import SavedInfo, Site
from fxopt.kernels.pack_activation import pack_activation
from fxopt.passes.activation.offload import HOST, Offload
from fxopt.training import measure
from fxopt.training.decisions import _taken
from fxopt.training.forms import Choices, Form
from fxopt.training.schedule import schedule
from fxopt.training.search import StepPlan, frontier
from fxopt.training.sites import Saved
from fxopt.training.step import Step
from tests.training.test_images import (
    ROUNDED,
    Anywhere,
    Example,
    Expensive,
    saved_of,
    taken_apart,
    treated,
    work,
)


def on_a_device(step: Step, rate: float) -> Saved:
    """The saved tensors of a step as if those copied to the host were not here any more."""
    saved = saved_of(step)
    for owner, offers in saved.offers.items():
        saved.offers[owner] = [
            replace(offer, treatment=away(offer.treatment, step.bytes[owner], rate))
            for offer in offers
        ]
    return saved


def away(treatment: Any, size: int, rate: float) -> Any:
    if not isinstance(treatment, Form) or not treatment.image.carrier:
        return treatment
    size = treatment.packed or size
    return replace(treatment, bytes=0, host=size, transfer=size / rate)


def test_what_the_link_carries_for_nothing_goes_to_the_host() -> None:
    """A fast link serves all; over a slow one the step would stand still, and runs ops again."""
    step = taken_apart((Expensive().train(), {"x": torch.randn(1024, 256)}))
    full = schedule(step, ()).live().max()
    lowest: dict[float, StepPlan] = {}
    for rate in (1e11, 1e7):
        saved = on_a_device(step, rate)
        found = frontier(step, saved.seconds, saved.droppable, saved.forms)
        lowest[rate] = next(p for p in found if p.peak < 0.75 * full)
        for plan in found:
            laid = schedule(step, plan.dropped, plan.stops, plan.images)
            assert plan.peak == laid.live().max()
            again_ = sum(saved.seconds[n] for n in laid.runs_again())
            assert plan.seconds == pytest.approx(again_ + laid.wait)
    assert lowest[1e11].host > 0.2 * full
    assert not lowest[1e11].dropped
    assert lowest[1e11].seconds < 1e-6
    assert lowest[1e7].dropped
    assert lowest[1e7].host == 0


def test_the_host_takes_no_more_than_it_has() -> None:
    step = taken_apart((Expensive().train(), {"x": torch.randn(1024, 256)}))
    saved, most = on_a_device(step, 1e11), 2.1 * 2**20
    found = frontier(step, saved.seconds, saved.droppable, saved.forms, host=most)
    assert 0 < max(plan.host for plan in found) <= most


def test_copies_run_beside_the_ops() -> None:
    """Between a copy's begin and its end lie ops, and memory counts from the one to the other."""
    step = taken_apart((Expensive().train(), {"x": torch.randn(1024, 256)}))
    saved = on_a_device(step, 3e9)
    forms = {o: f for o, found in saved.forms.items() for f in found if f.label == "host"}
    owner = step.saved[len(step.saved) // 2]
    laid = schedule(step, (), (), {owner: forms[owner]})
    kinds = [item.kind for item in laid.items if item.node is owner]
    assert kinds == ["run", "send", "release", "fetch", "arrive"]
    at = {item.kind: i for i, item in enumerate(laid.items) if item.node is owner}
    pace = [step.pace.get(i.node, 0.0) if i.kind == "run" else 0.0 for i in laid.items]
    assert laid.wait == 0
    for begin, end in (("send", "release"), ("fetch", "arrive")):
        assert sum(pace[at[begin] : at[end]]) >= forms[owner].transfer
    plain = schedule(step, ())
    gone = plain.live() - laid.live()
    assert set(gone) == {0, step.bytes[owner]}
    runs = [i for i, item in enumerate(laid.items) if item.kind == "run"]
    without = [n for n, i in enumerate(runs) if at["release"] < i < at["fetch"]]
    # the node before which it goes may take as much itself
    assert {*without[1:]} <= {*np.flatnonzero(gone)} <= {*without}


def test_codes_cross_a_link_that_tensors_wait_for() -> None:
    """Where the copies of all tensors take twice the forward, those of their codes take half."""
    step = taken_apart((Expensive().train(), {"x": torch.randn(1024, 256)}))
    saved = saved_of(step)
    sizes = sum(step.bytes[owner] for owner in step.saved)
    forward = sum(step.pace[node] for node in step.forward)
    saved = on_a_device(step, sizes / (2 * forward))
    laid = {
        label: schedule(step, (), (), {
            o: f for o, found in saved.forms.items() for f in found if f.label == label
        })
        for label in ("host", "int8-host")
    }  # fmt: skip
    whole, codes = laid["host"], laid["int8-host"]
    assert [len(each.images) for each in laid.values()] == [len(step.saved)] * 2
    assert codes.wait < 0.2 * whole.wait
    assert codes.live().max() < whole.live().max()
    found = frontier(step, saved.seconds, (), saved.forms, error=0.02)
    labels = {form.label for plan in found for form in plan.images.values()}
    assert "int8-host" in labels
    exact = frontier(step, saved.seconds, (), saved.forms)
    assert {form.label for plan in exact for form in plan.images.values()} <= set(HOSTS)
    assert found[-1].peak <= exact[-1].peak
    assert found[-1].seconds < 0.8 * exact[-1].seconds


HOSTS = ("host", "host1", "host0")


@cache
def four_layers() -> Step:
    return taken_apart((Expensive().train(), {"x": torch.randn(1024, 256)}))


def slow(step: Step, share: float) -> Saved:
    """On a link that takes so much of the backward for one tensor."""
    backward = sum(step.pace[node] for node in step.backward)
    return on_a_device(step, step.bytes[step.saved[0]] / (share * backward))


@pytest.mark.parametrize(("share", "free"), [(0.35, 6), (1.2, 7)])
def test_a_slow_link_is_waited_for_where_a_budget_asks(share: float, free: int) -> None:
    """Where copies that wait for nothing all meet at the border, bounded ones reach a smaller peak,
    at a price; and whatever was on the frontier without them is there as well, or better. Peaks in
    tensors: without bounds no fewer than `free`."""
    step = four_layers()
    saved_of(step)
    saved = slow(step, share)
    only = {o: [f for f in forms if f.label == "host"] for o, forms in saved.forms.items()}
    without = frontier(step, saved.seconds, (), only)
    found = frontier(step, saved.seconds, (), saved.forms)
    for plan in without:
        assert any(p.peak <= plan.peak and p.seconds <= plan.seconds for p in found)
    smallest = found[-1]
    tensor = step.bytes[step.saved[0]]
    assert (without[-1].peak // tensor, smallest.peak // tensor) == (free, 4)
    assert smallest.seconds > without[-1].seconds
    assert any(form.bounded for form in smallest.images.values())
    laid = schedule(step, (), (), smallest.images)
    assert (smallest.peak, smallest.seconds) == (laid.live().max(), pytest.approx(laid.wait))
    # no more than as if nothing ran beside the copies
    assert smallest.seconds <= 2 * sum(form.transfer for form in smallest.images.values()) + 1e-12


@given(st.integers(0, 2**31), st.floats(0.01, 3))
def test_bounds_never_bring_a_higher_peak(seed: int, share: float) -> None:
    """For the same tensors, at every op of the step."""
    step, draw = four_layers(), random.Random(seed)
    if not step.pace:
        saved_of(step)
    transfer = share * sum(step.pace[node] for node in step.backward)
    owners = draw.sample(step.saved, draw.randint(1, len(step.saved)))
    forms = {
        depth: Form(Image(carrier=replace(HOST, depth=depth)), "", 0, transfer=transfer)
        for depth in (None, 0, 1, 2)
    }
    free = schedule(step, (), (), dict.fromkeys(owners, forms[None]))
    bounded = schedule(step, (), (), {owner: forms[draw.choice([*forms])] for owner in owners})
    assert (bounded.live() <= free.live()).all()
    assert bounded.wait >= free.wait - 1e-12


@pytest.mark.parametrize("kind", ["", "int8-"])
def test_a_slow_link_has_the_peak_that_is_measured(kind: str) -> None:
    """On a CPU what waits in host memory counts as well; what is in flight tells them apart."""
    example = Expensive().train(), {"x": torch.randn(1024, 256)}
    peaks: list[int] = []
    outcomes: list[measure.Outcome] = []
    for label in HOSTS:

        def choose(saved: Saved, label: str = kind + label) -> Choices:
            chosen = {o: f for o, fs in saved.forms.items() for f in fs if f.label == label}
            backward = sum(saved.step.pace[node] for node in saved.step.backward)
            return {owner: replace(form, transfer=backward) for owner, form in chosen.items()}

        module, plan, saved = treated(example, choose)
        assert len(plan.images) == len(saved.step.saved)
        outcomes.append(measure.outcome(module, example[1]))
        peaks.append(measure.peak(module, example[1]))
        assert peaks[-1] == pytest.approx(plan.peak, rel=1e-4)
    assert peaks[0] > peaks[1] > peaks[2]
    assert [found.difference(outcomes[0]) for found in outcomes] == [("", 0.0)] * len(HOSTS)


OFFLOADED = "activation.offload"


def test_a_cpu_has_no_host(small: Example) -> None:
    model, inputs = small
    budget, asked = fxopt.Budget(activations="90%"), [OFFLOADED, "activation.recompute"]
    plan = fxopt.plan(model, budget, inputs, workload=work(inputs), rewrites=asked)
    said = [refused.reason for refused in plan.refusals if refused.rewrite == OFFLOADED]
    assert len(said) == len(plan.decisions)
    assert set(said) == {"it lies in host memory: a copy there would free nothing"}


def test_an_offloaded_tensor_is_replayed_from_a_file(
    small: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Offload, "match", Anywhere.match)
    offered = [Candidate(OFFLOADED, "host", {}), Candidate(OFFLOADED, "host0", {"depth": 0})]
    monkeypatch.setattr(Offload, "candidates", lambda *_: offered)
    model, inputs = small
    budget = fxopt.Budget(activations="150%")
    plan = fxopt.plan(model, budget, inputs, workload=work(inputs), rewrites=[OFFLOADED])
    assert not plan.rewritten
    key = plan.decisions[2].key
    plan.lock(key, OFFLOADED, "host0")
    stored = fxopt.Plan.load(plan.save(tmp_path / "plan.json"))
    opt = fxopt.apply(model, stored, example_inputs=inputs)
    (taken,) = opt.plan.rewritten
    assert (taken.key, taken.rewrite, taken.label) == (key, OFFLOADED, "host0")
    assert taken.parameters == {"depth": 0}
    assert "bit-equal" in opt.plan.notes[-1]
    assert OFFLOADED in str(opt.plan)


def test_reasons_say_where_a_tensor_waits() -> None:
    form = Form(Image(carrier=HOST), "host", 0, host=2**21)
    offer: Any = SimpleNamespace(treatment=form, cost=Cost(seconds=0.002))
    assert _taken(offer, 2**21) == (
        "2 MiB wait in host memory; alone it takes 2 ms of standing still for copies"
    )
    offer.treatment = replace(form, image=Image(pack_activation, carrier=HOST))
    assert _taken(offer, 2**22) == (
        "2 MiB wait in host memory in place of 4 MiB; "
        "alone it takes 2 ms of packing and standing still for copies"
    )


def test_small_tensors_and_parts_of_others_stay() -> None:
    info = SavedInfo((1000,), (1,), torch.float32, "cuda:0", 4000, True)
    site = Site("activation", "x", "x", info, op="x")
    match = Offload().match(site)
    assert isinstance(match, Match)
    assert not Offload().candidates(match, [])
    assert "4000 bytes: less than 1048576" in str(Offload().refusal(match, []))
    offered = Offload(least=1000).candidates(match, [])
    assert [(c.label, c.parameters) for c in offered] == [
        ("host", {}), ("host1", {"depth": 1}), ("host0", {"depth": 0}),
    ]  # fmt: skip
    part = replace(site, info=replace(info, whole=False))
    assert Offload().match(part) == Refusal(
        "its memory is more than the tensor, and the rest may be read as well"
    )
    calls = Offload().lower(match, Offload(least=0).candidates(match, [])[0], None)  # pyright: ignore
    assert [call.host_bytes for call in calls] == [4000, 4000]


@pytest.mark.gpu
@pytest.mark.parametrize("rewrites", [[OFFLOADED], None, [ROUNDED]])
def test_budgets_hold_on_the_device(rewrites: list[str] | None) -> None:
    from fxopt.kernels.offload_activation.op import pool_of

    model = Expensive().to("cuda")
    inputs = {"x": torch.randn(65536, 256, device="cuda")}
    # Without offloading, the sum for a bias's gradient, which takes twice its matrix, needs more.
    share = "70%" if rewrites else "80%"
    budget = fxopt.Budget(activations=share, **({"relative_error": 0.02} if rewrites else {}))
    opt = fxopt.optimize(model, budget, inputs, workload=work(inputs), rewrites=rewrites)
    assert opt.report.kept
    row = next(row for row in opt.plan.totals if row.name == "activations")
    assert row.predicted == pytest.approx(row.measured, rel=0.02)
    if rewrites == [ROUNDED]:
        assert "rounded" in opt.plan.notes[-1]
        return
    assert "rounded" not in opt.plan.notes[-1]
    held = pool_of(torch.device("cuda", torch.cuda.current_device())).bytes
    first = measure.outcome(opt, inputs)
    for _ in range(3):
        assert measure.outcome(opt, inputs).difference(first) == ("", 0.0)
    assert pool_of(torch.device("cuda", torch.cuda.current_device())).bytes == held
    if rewrites:
        assert {d.rewrite for d in opt.plan.rewritten} == {OFFLOADED}
        assert held > 0
