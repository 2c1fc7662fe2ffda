"""What ops take beside their results counts while they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.training import workspaces
from fxopt.training.alive import live
from fxopt.training.holders import held
from fxopt.training.schedule import schedule
from fxopt.training.step import Step
from tests.training.test_images import taken_apart

CPU = torch.device("cpu")
TAKEN = 1 << 20
SUM = torch.ops.aten.sum.dim_IntList


@pytest.fixture
def step() -> Step:
    layers = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.Tanh())]
    return taken_apart((nn.Sequential(*layers), {"input": torch.randn(512, 64)}))


def summing(step: Step) -> list[fx.Node]:
    return [node for node in step.backward if node.target is SUM]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As on a GPU: sums take memory of their own, other results but that of the allocator's
    rounding. The calls that were run, by their result's shape."""
    ran: list[str] = []

    def peak(call: Callable[[], Any], device: torch.device) -> int:
        with Seen() as seen:
            call()
        target, result = seen.calls[-1]
        ran.append(f"{target} {tuple(result.shape)}")
        return result.nbytes + (TAKEN if "sum" in target else 512)

    monkeypatch.setattr(workspaces, "peak_live_bytes", peak)
    return ran


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((str(func), result))
        return result


def test_each_distinct_call_is_run_once(step: Step, runs: list[str]) -> None:
    taken = workspaces.workspaces(step, CPU)
    assert len(summing(step)) == 3
    assert taken == dict.fromkeys(summing(step), TAKEN)
    assert len(runs) == len({*runs})
    assert any("mm" in run for run in runs)
    assert any("tanh_backward" in run for run in runs)


def test_what_a_device_cannot_hold_is_not_known(
    step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(workspaces, "peak_live_bytes", full)
    assert workspaces.workspaces(step, CPU) == {}


def test_a_workspace_is_alive_at_its_op_alone(step: Step) -> None:
    laid = schedule(step, ())
    before, first = live(laid), summing(step)[0]
    place = [*step.forward, *step.backward].index(first)
    step.__dict__.pop("lifetimes")
    step.temporary = {first: TAKEN}
    more = live(schedule(step, ())) - before
    assert more[place] == TAKEN
    assert more.sum() == TAKEN
    assert sum(part.max() for part in held(schedule(step, ())).values()) >= TAKEN


def test_random_numbers_of_the_user_are_not_drawn(runs: list[str]) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5))
    step = taken_apart((model, {"input": torch.randn(512, 64)}))
    state = torch.get_rng_state()
    workspaces.workspaces(step, CPU)
    assert torch.equal(torch.get_rng_state(), state)
